# %% [markdown]
# # An LMNet from scratch
#
# The vertices of this network are copies of model b without embedding and head. The edges are small new blocks. We train the edges
# only, on questions that b alone cannot answer.

# %%
import itertools

import jax

import jaxcomm as jc
from jaxcomm import lmnet
from jaxcomm.evals.networks import texts, wires
from jaxcomm.evals.pair import folder
from jaxcomm.training import begin, make_optimizer, make_step, pack

b = jc.load_agent(folder("b"))
question = texts.two_places(0, 0)
print(question.prompt, "->", question.answer)
print(
    "b alone:",
    b.text(jc.generate(b.params, b.tokenize([question.prompt]), max_new_tokens=8, stop_tokens=b.stop_tokens)),
)

# %% [markdown]
# ## Build it
#
# Widths 1-2-1: one vertex reads the tokens, two in the middle, one writes. All vertices share b's weights. An edge is a small MLP. (The
# default, a whole decoder block, learns more and takes longer.)

# %%
network = lmnet.init_network(jax.random.key(0), b.params, widths=(1, 2, 1), edge="mlp")
print(lmnet.size(network.edges), "numbers in the edges")

# %% [markdown]
# ## Train the edges
#
# `split` parts a network into its wires, which are trained, and the rest, which stays. The loss counts the tokens of the answers only.

# %%
steps, rows, columns = 80, 4, 64
wired, frozen = network.split()
optimizer = make_optimizer(3e-3, steps)
step = jax.jit(make_step(optimizer))
state = begin(wired, optimizer)


def documents():
    for n in itertools.count():
        text = texts.two_places(0, n)
        asked = b.encode(text.prompt)
        answered = [*b.follow(text.prompt, f" {text.answer}"), b.stop_tokens[0]]
        yield [*asked, *answered], [0.0] * len(asked) + [1.0] * len(answered)


for n, (batch, _) in zip(range(steps), pack(documents(), rows, columns)):
    state, told = step(state, frozen, jax.tree.map(lambda x: x[None], batch))
    if n % 20 == 0 or n == steps - 1:
        print(f"step {n:2}: loss {float(told['loss']):.3f}")

# %% [markdown]
# ## Use it
#
# A network takes the place of a model: `generate`, agents and every command accept it.

# %%
trained = state.trained.join(frozen)
agent = jc.Agent(trained, b.tokenizer, b.stop_tokens)
tests = [texts.two_places(0, n, test=True) for n in range(40)]
out = lmnet.generate(
    trained, agent.tokenize([test.prompt for test in tests]), max_new_tokens=8, stop_tokens=b.stop_tokens
)
replies = [text.strip() for text in agent.text(out)]
both = sum(reply == test.answer for reply, test in zip(replies, tests, strict=True))
first = sum(
    reply.split(" and ")[0] == test.answer.split(" and ")[0] for reply, test in zip(replies, tests, strict=True)
)
print(f"both countries right: {both} of {len(tests)}; the first one: {first}")
for test, reply in list(zip(tests, replies, strict=True))[:3]:
    print(test.prompt, "->", reply, "| right:", test.answer)

# %% [markdown]
# ## Look at the wires
#
# Every wire can be read in words. The share says how sure the reading is.

# %%
print(wires.text(wires.read(agent, question.prompt)))

# %% [markdown]
# Eighty steps are few: the network has learned the form of the answer and the first country, and begins to learn the second.
#
# [Networks](../lmnet.md) trains longer from the command line, compares edges with LoRA, and splits what edges give
# into presence and content.
