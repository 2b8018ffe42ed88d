# %% [markdown]
# # Where does the fact live?
#
# We sweep every layer k of A and every layer j of B, with another item's message beside each cell. The map of *content* shows
# where the fact is in A, and where B can still use it.

# %%
import jax
import numpy as np
from IPython.display import Image

import jaxcomm as jc
from jaxcomm.evals.figures import LayerMap, layer_maps
from jaxcomm.evals.games import draw
from jaxcomm.evals.pair import folder

b = jc.load_agent(folder("b"))
game = draw("countries", n=40)
print(game.items[0].prompt_a, "|", game.items[0].prompt_b, "|", game.items[0].answer)

# %% [markdown]
# ## Every pair of layers, in one call
#
# `sweep_answers` reads A's and B's prompts once. It scores the right answer in every cell: `exact` says whether greedy decoding would
# write it. Nothing is decoded.

# %%
told = b.tokenize([item.prompt_a for item in game.items])
questions = [item.prompt_b for item in game.items]
right = [item.answer for item in game.items]
asked, answers = b.tokenize(questions, 8), b.spell(questions, right)
layers = range(1, b.params.config.layers + 1)
grid = dict(ks=layers, js=layers, stop_tokens=b.stop_tokens)

own = jc.sweep_answers(b.params, b.params, told, asked, answers, **grid).exact[0]
print(own.shape, f"best cell {own.mean(axis=-1).max():.0%}")

# %% [markdown]
# ## The same cells with another item's message
#
# `derange` draws another item for each, whose answer differs. A cell that is good with the wrong message is not good because of
# what the message says.

# %%
order = jc.derange(right)
others = jax.tree.map(lambda x: x[order], told)
other = jc.sweep_answers(b.params, b.params, others, asked, answers, **grid).exact[0]

content = 100 * (own.mean(axis=-1) - other.mean(axis=-1))
best = tuple(int(x) + 1 for x in np.unravel_index(content.argmax(), content.shape))
print("most content at k, j =", best)

# %%
maps = [
    LayerMap("own message", 100 * own.mean(axis=-1), layers, layers, best),
    LayerMap("another item's message", 100 * other.mean(axis=-1), layers, layers, best),
    LayerMap("content: own - other", content, layers, layers, best),
]
Image(layer_maps(maps, label="exact match, % or points", columns=3))

# %% [markdown]
# After layers 1 and 2 there is nothing to send: the last token's state does not hold the country yet. After layer 3 it does, in a form
# that only B's first layers can use. From layer 4 on, the cells differ by where B takes the state in.

# %% [markdown]
# ## Do not report the best cell
#
# The best of 36 cells on the same questions looks better than it is. Choose on one half, report on the other.

# %%
half = np.arange(40) % 2 == 0
chosen = np.unravel_index((own[..., half].mean(-1) - other[..., half].mean(-1)).argmax(), content.shape)
k, j = (int(x) for x in chosen)
print(f"chosen on one half: k = {k + 1}, j = {j + 1}")
print(f"there {own[k, j, half].mean():.0%}, on the other half {own[k, j, ~half].mean():.0%}")

# %% [markdown]
# ## From the command line
#
# `jaxcomm sweep` does all of this, with intervals and every control: [Sweep the layers](../sweeps.md).
