# %% [markdown]
# # Two models, one map
#
# Model a has width 160, model b has width 128. A state of a means nothing to b. A linear map W translates it. We fit W in closed
# form, and see that the layer it maps into decides whether it works.

# %%
import jaxcomm as jc
from jaxcomm.evals.games import draw
from jaxcomm.evals.pair import folder
from jaxcomm.evals.play import play
from jaxcomm.evals.scores import percent
from jaxcomm.evals.sentences import read_both
from jaxcomm.evals.sweeps.fitting import own_statements

a, b = (jc.load_agent(folder(name), name=name) for name in "ab")
print("widths", a.params.config.width, b.params.config.width)

# %% [markdown]
# ## Without a map
#
# A message knows its model. Another model refuses it:

# %%
message = jc.send(a.params, a.tokenize(["Alice is at the Acropolis of Athens."]), 7)
try:
    jc.generate(b.params, b.tokenize(["Where is Alice?"]), edits=[jc.receive(message, 1)], max_new_tokens=4)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Fit W
#
# Both models read the same 1000 sentences. None of them belongs to a game. `fit_maps` solves for W from layer 7 of a to every layer
# of b, in one pass over the text. The error is a share of the mean square of b's states, on sentences that were held out.

# %%
sentences = own_statements("countries")
print(sentences[0])
into = range(1, 7)
maps = jc.fit_maps(a.params, b.params, read_both(a, b, sentences), ks=[7], js=into)
for layer, error in zip(into, maps.error[0].tolist(), strict=True):
    print(f"into layer {layer}: error {error:.3f}")

# %% [markdown]
# ## Play with it
#
# All maps are grafted after layer 1 of b. Only the layer they map into differs.

# %%
game = draw("countries", n=40)
print("alone:", percent(play(game, "silent", a, b).accuracy))
for layer in (1, 2, 4, 6):
    outcome = play(game, "activation", a, b, k=7, j=1, W=maps.W[0, layer - 1])
    print(f"W into layer {layer}: {percent(outcome.accuracy)} % right")

# %% [markdown]
# The map with the smallest error is the worst messenger. Into layer 1 W is nearly exact, but the last token of b has not read the
# fact there yet: a good copy of a state without the fact. Into layers 4 and 6 the error is larger, and the fact is there.

# %% [markdown]
# ## Is it this message?

# %%
for control in ("other", "zero", "mean"):
    outcome = play(game, "activation", a, b, k=7, j=1, W=maps.W[0, 3], control=control)
    print(f"{control}: {percent(outcome.accuracy)} % right")

# %% [markdown]
# Another question's message, zeros and the mean message are worth nothing: the gain is content.
#
# [Fit a map between two models](../maps.md) has the command line. [Channels](../channels.md#maps-of-keys-and-values) has maps of keys
# and values.
