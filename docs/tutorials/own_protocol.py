# %% [markdown]
# # Your own protocol
#
# A protocol is a function that returns B's `Turn`. We write one, `telegram`: A writes a message, and only its last words are sent. Then we play it beside the others, with controls.

# %%
import dataclasses

import jaxcomm as jc
from jaxcomm import protocols
from jaxcomm.evals.games import draw
from jaxcomm.evals.pair import folder
from jaxcomm.evals.play import play
from jaxcomm.evals.scores import percent

b = jc.load_agent(folder("b"), name="b")
told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]

# %% [markdown]
# ## What protocols are made of
#
# Every protocol sends, and then lets B receive. Text has `send_text` and `receive_text`, states have `send_states` and
# `receive_states`.

# %%
talk = protocols.Conversation(max_message_tokens=24)
sent = protocols.send_text(b, told, talk)
print(sent.message.text)
turn = protocols.receive_text(b, asked, sent, talk)
print(turn.rendered(0))
print(turn.write(8)[0].text)

# %% [markdown]
# ## Change what is sent
#
# A message is a value, so a protocol can put anything in between. `control` is what stands in for the message, if anything does.


# %%
def telegram(a, b, prompts_a, prompts_b, *, words=1, control=None, sampling=None, seed=0):
    """A writes; only the last words of its message are sent."""
    talk = protocols.Conversation(max_message_tokens=24, sampling=sampling, seed=seed)
    sent = protocols.send_text(a, prompts_a, talk)
    short = jc.Message(text=tuple(" ".join(text.split()[-words:]) for text in sent.message.text))
    if control is not None:  # a `StandIn`; this protocol knows only "other", another item's message
        short = jc.stand_in(short, "other", answers=control.answers)
    details = [{**told, "message": text} for told, text in zip(sent.details, short.text, strict=True)]
    spent = [
        dataclasses.replace(cost, sent=len(text.encode())) for cost, text in zip(sent.spent, short.text, strict=True)
    ]
    return protocols.receive_text(b, prompts_b, protocols.Sent(short, details, spent), talk)


turn = telegram(b, b, told, asked)
print(turn.rendered(0), "->", turn.write(8)[0].text)

# %% [markdown]
# ## Play it
#
# `PROTOCOLS` is a table of names. What stands there is played, scored and paid for like the others.

# %%
protocols.PROTOCOLS["telegram"] = telegram
game = draw("countries", n=40)
for name, own in {
    "silent": {},
    "message": {},
    "telegram": {},
    "telegram, 2 words": dict(words=2),
    "telegram, another's": dict(control="other"),
}.items():
    outcome = play(game, name.split(",")[0], b, b, **own)
    spent = [reply.spent.sent for reply in outcome.replies]
    print(f"{name:20} {percent(outcome.accuracy):14} % right, {sum(spent) / len(spent):5.1f} bytes")

# %% [markdown]
# ## Another one: two states instead of one
#
# `communicate` sends the last token's state. Edits are a list, so a protocol may send more. Here A's states after layers 4 and 6 go
# into two layers of B.

# %%
prompts, question = b.tokenize(told), b.tokenize(asked, 8)
edits = [jc.receive(jc.send(b.params, prompts, jc.Site("resid_post", k, "last")), j) for k, j in ((4, 1), (6, 5))]
print(b.text(jc.generate(b.params, question, edits=edits, max_new_tokens=8, stop_tokens=b.stop_tokens)))

# %% [markdown]
# [Protocols](../reference/protocols.md) has every part. [Channels](../channels.md) has what can be sent besides states and text.
