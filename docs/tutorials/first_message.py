# %% [markdown]
# # First message in five minutes
#
# Model A reads a fact. Model B is asked about it and never sees the fact in words. We hand B one state of A.

# %% [markdown]
# ## Load a model
#
# The package contains two small models. `b` has 6 layers of width 128. It knows landmarks and countries. Any checkpoint that
# `load_agent` takes works in the same way.

# %%
import jaxcomm as jc
from jaxcomm.evals.pair import folder

b = jc.load_agent(folder("b"))
print(b.params.config.layers, "layers, width", b.params.config.width)

# %% [markdown]
# ## B alone
#
# B does not know where Alice is, so it guesses.

# %%
told = b.tokenize(["Alice is at the Acropolis of Athens."])
asked = b.tokenize(["Which country is Alice located in?"], 8)  # room for 8 new tokens
how = dict(max_new_tokens=8, stop_tokens=b.stop_tokens)
print(b.text(jc.generate(b.params, asked, **how)))

# %% [markdown]
# ## B with a message
#
# `send` reads the fact and keeps one state: that of the last token after layer 5. `receive` makes an edit of it: after layer 2, B's
# last state is replaced. Here A and B are the same model.

# %%
message = jc.send(b.params, told, jc.Site("resid_post", layer=5, positions="last"))
print(message)
print(message.bytes, "bytes")

# %%
print(b.text(jc.generate(b.params, asked, edits=[jc.receive(message, 2)], **how)))

# %% [markdown]
# `communicate` does both steps in one compiled program:

# %%
print(b.text(jc.communicate(b.params, b.params, told, asked, k=5, j=2, **how)))

# %% [markdown]
# ## Did B use *this* message?
#
# A gain may come from any message of this kind. So we send another one. If B names the other country, it used what the message says.

# %%
other = jc.send(b.params, b.tokenize(["Alice is at the Colosseum."]), jc.Site("resid_post", 5, "last"))
print(b.text(jc.generate(b.params, asked, edits=[jc.receive(other, 2)], **how)))

# %% [markdown]
# And zeros, which say nothing:

# %%
nothing = jc.stand_in(message, "zero")
print(b.text(jc.generate(b.params, asked, edits=[jc.receive(nothing, 2)], **how)))

# %% [markdown]
# ## What does B make of it?
#
# The logit lens names B's likeliest next token after each layer, with the message in it. The message enters after layer 2.

# %%
lens = jc.logit_lens(b.params, asked, edits=[jc.receive(message, 2)], layers=range(1, 7))
for layer, token in zip(range(1, 7), b.tokens(lens.tokens[0, :, 0]), strict=True):
    print(layer, token)

# %% [markdown]
# ## Next
#
# - [Where does the fact live?](where_is_the_fact.md) tries every pair of layers.
# - [Presence and content](../controls.md) says how to measure what a message did.
