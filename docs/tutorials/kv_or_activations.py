# %% [markdown]
# # KV or activations?
#
# A can hand over one state, or the keys and values of everything it read, or text. We compare accuracy, FLOPs and bytes.

# %%
from IPython.display import Image

import jaxcomm as jc
from jaxcomm.evals.figures import every_cost
from jaxcomm.evals.games import draw
from jaxcomm.evals.pair import folder
from jaxcomm.evals.play import play
from jaxcomm.evals.scores import percent

b = jc.load_agent(folder("b"), name="b")
game = draw("countries", n=40)

# %% [markdown]
# ## Play every channel, own and another's message
#
# `kv` lets B attend to A's keys and values, as if it had read A's prompt. `layers` says which layers of B see them.

# %%
channels = {
    "silent": ("silent", {}),
    "skyline": ("skyline", {}),
    "message": ("message", {}),
    "activation": ("activation", dict(k=4, j=1)),
    "kv, all layers": ("kv", {}),
    "kv, layers 4 to 6": ("kv", dict(layers=[4, 5, 6])),
    "kv, layers 1 to 3": ("kv", dict(layers=[1, 2, 3])),
}
mean = lambda values: sum(values) / len(values)
points = []
print(f"{'channel':20}{'own message':>16}{'another':>14}{'MFLOPs':>9}{'bytes':>9}")
for name, (protocol, own) in channels.items():
    outcome = play(game, protocol, b, b, **own)
    sends = protocol not in ("silent", "skyline")
    other = percent(play(game, protocol, b, b, control="other", **own).accuracy) if sends else ""
    flops = mean([reply.spent.flops for reply in outcome.replies])
    sent = mean([reply.spent.sent for reply in outcome.replies])
    points.append((name.replace(",", ":"), flops, sent, outcome.accuracy))
    print(f"{name:20}{percent(outcome.accuracy):>16}{other:>14}{flops / 1e6:9.0f}{sent:9.0f}")

# %%
Image(every_cost({"Countries, b with itself": points}))

# %% [markdown]
# ## What to see here
#
# - Text is cheapest in bytes and dearest in FLOPs: A writes it token by token, and B reads it.
# - Keys and values cost as many FLOPs as an activation, and a hundred times the bytes. They lose nothing.
# - Half of the layers is enough, if it is the later half.
# - Another question's message gives nothing in any channel, so every gain is content.
#
# On a real model the picture differs: there keys and values carry less than an activation
# ([channels: what came out](../channels.md#what-came-out)). So measure it on yours.

# %% [markdown]
# ## In Python
#
# The parts of `kv` are `send_cache`, `receive_cache` and `select`:

# %%
told = b.tokenize(["Alice is at the Acropolis of Athens."])
asked = b.tokenize(["Which country is Alice located in?"], 8)
prefix = jc.receive_cache(jc.send_cache(b.params, told), b.params)
later = jc.select(prefix, [4, 5, 6])
how = dict(max_new_tokens=8, stop_tokens=b.stop_tokens)
print(b.text(jc.generate(b.params, asked, past=[later], **how)), later.bytes.sum(), "of", prefix.bytes.sum(), "bytes")
