# %% [markdown]
# # Reading a report without fooling yourself
#
# Every command prints more than an accuracy. This tutorial goes through a report line by line, and shows three ways to be wrong.

# %%
import subprocess
import tempfile
from pathlib import Path

from IPython.display import Markdown

out = Path(tempfile.mkdtemp())
command = "jaxcomm play --a pair:b --b pair:b --protocol message activation --k 4 --j 1 --n 40 --control other noise"
subprocess.run([*command.split(), "--out", out], check=True, capture_output=True)
print(*sorted(path.name for path in out.iterdir()))

# %% [markdown]
# ## The tables
#
# `report.md` has what the command also prints. Here are its tables:

# %%
report = (out / "report.md").read_text().split("What was read and said")[0]
lines = [line.replace("## ", "### ") for line in report.splitlines() if not line.startswith(("# ", "!["))]
Markdown("\n".join(lines).rstrip("\n #"))

# %% [markdown]
# ## Line by line
#
# 1. **Private or shared?** The head says what A knows and B does not. If B reads everything that A knows, a message cannot tell it
#    anything new.
# 2. **The scores.** `[low, high]` is a 95 % interval. "silent" is B alone. "message, other" is B with another item's message.
# 3. **Presence and content.** total = presence + content. Presence is what another item's message does. Content is what this one
#    adds. Read the content.
# 4. **p** is corrected for the number of tests in the table (Holm). It is not the p of one line alone.
# 5. **Smallest** is the effect that a run of this size finds in 80 % of cases. A content that is smaller and not significant says
#    nothing either way.
# 6. **Sent and heard.** Sent: a probe finds the answer in the message. Heard: B's next word moves, and moves differently for different
#    messages.

# %% [markdown]
# ## Mistake 1: a gain that is presence
#
# Here is a channel that helps B with any message. Total looks fine. Content is nothing.

# %%
import numpy as np

from jaxcomm.evals.effects import p_written, split
from jaxcomm.evals.scores import percent

rng = np.random.default_rng(0)
alone = rng.random(100) < 0.3
helped = alone | (rng.random(100) < 0.4)  # any message helps
own, other = helped, helped ^ (rng.random(100) < 0.05)
found = split(own, other, alone)
for name, effect in zip(found._fields, found, strict=True):
    print(f"{name:9} {percent(effect.value):>14} points, p {p_written(effect.p)}")

# %% [markdown]
# ## Mistake 2: the best of many
#
# 36 cells that do nothing, 40 questions: the best cell looks like an effect. On other questions it is gone. So `jaxcomm sweep` chooses
# on one half and reports on the other.

# %%
cells = rng.random((36, 80)) < 0.25  # every cell is right in a quarter of the cases
first, second = cells[:, :40], cells[:, 40:]
best = first.mean(axis=1).argmax()
print(f"best of 36 cells: {first[best].mean():.0%}; the same cell on other questions: {second[best].mean():.0%}")

# %% [markdown]
# ## Mistake 3: too few items
#
# An effect of 10 points is real here, and 40 items miss it most of the time. The report says so: it is below *smallest*.


# %%
def measure(n):
    before = rng.random(n) < 0.3
    after = before | (rng.random(n) < 0.1 / 0.7)
    return split(after, before, before).content


for n in (40, 100, 400):
    effects = [measure(n) for _ in range(200)]
    seen = np.mean([effect.p <= 0.05 for effect in effects])
    print(
        f"{n:4} items: found in {seen:.0%} of 200 runs; smallest {100 * effects[0].smallest(12):.0f} points among 12 tests"
    )

# %% [markdown]
# ## A checklist
#
# - Is the information private?
# - Is the content above 0, after correction?
# - Were layers, prompts and maps chosen on other items?
# - Could a run of this size have seen it?
# - Does a text of the same bytes or FLOPs do as well (`--control equal-bytes equal-flops`)?
#
# [Presence and content](../controls.md) has every control.
