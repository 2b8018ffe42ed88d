"""What B understands of mapped keys and values: the embedded pair, a -> b, Countries; text, number of texts, layers a map reads.

python benchmarks/kv_mapping.py        one CPU thread, about three minutes
"""

from __future__ import annotations

import os
import platform

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm as jc
from jaxcomm.evals.games import countries
from jaxcomm.evals.pair import folder
from jaxcomm.evals.sentences import read_both, sentences

ITEMS = countries(7, 60)
FITS = {
    "200 statements": ("countries", 200, dict(stride=1)),
    "1000 statements": ("countries", 1000, dict(stride=1)),
    "1000 statements, 1 layer": ("countries", 1000, dict(stride=1, sources=1)),
    "1000 statements, 2 layers": ("countries", 1000, dict(stride=1, sources=2)),
    "3000 statements": ("countries", 3000, dict(stride=1)),
    "3000 statements, stride 4": ("countries", 3000, dict(stride=4)),
    "1000 of Tip Sheets": ("tip_sheets", 1000, dict(stride=1)),
}


def main() -> None:
    print(
        f"jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores; {len(ITEMS)} items; lowest .. highest of B's layers"
    )
    a, b = (jc.load_agent(folder(name), name=name) for name in "ab")
    contexts, questions = [item.prompt_a for item in ITEMS], b.tokenize([item.prompt_b for item in ITEMS], 8)
    of_a, own = (jc.prefill(agent.params, agent.tokenize(contexts))[1] for agent in (a, b))

    def right(*past: jc.KVCache) -> int:
        out = jc.generate(b.params, questions, past=past, max_new_tokens=8, stop_tokens=b.stop_tokens)
        return sum(said == item.answer for said, item in zip(b.text(out), ITEMS, strict=True))

    print(f"B's own keys and values: {right(own)} right; none: {right()}")
    for name, (game, n, how) in FITS.items():
        text = sentences(f"statements:{game}", n, seed=3)
        maps = jc.fit_kv_maps(a.params, b.params, read_both(a, b, text), **how)
        mapped = jc.map_cache(maps, of_a, a.params, b.params)
        other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), mapped)
        cosine = jc.attention_cosine(b.params, b.tokenize(contexts), questions, mapped)
        low_high = lambda x: f"{np.min(x):.2f} .. {np.max(x):.2f}"
        print(
            f"{name}: R2 of keys {low_high(maps.k.r2)}, of values {low_high(maps.v.r2)}; cosine {low_high(cosine)}; "
            f"{right(mapped)} right, with another item's {right(other)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
