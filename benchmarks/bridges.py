"""A fuser (C2C) where the sharer knows what the receiver does not: 300 invented landmarks, the embedded pair, a -> b.

The sharer is a, trained on in which country each of them is. The bridge and LoRA on b learn from 200 of them, and are asked
about the other 100. B alone cannot know those; what is answered there has crossed the bridge.

python benchmarks/bridges.py [FOLDER]        two cores, about twenty minutes; FOLDER keeps what is done
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import struct

import jaxcomm as jc
from jaxcomm import converters
from jaxcomm.converters.checkpoints import is_saved
from jaxcomm.evals.networks.settings import Recipe
from jaxcomm.evals.networks.texts import Text, questions, source
from jaxcomm.evals.networks.training import train
from jaxcomm.evals.networks.trials import answers
from jaxcomm.evals.pair import folder
from jaxcomm.evals.scores import exact_match

FACTS, TAUGHT = 300, 200
COUNTRIES = ("Greece", "Italy", "France", "Japan", "Peru", "Egypt", "Jordan", "India", "China", "Mexico")
PEOPLE = ("Alice", "Bob", "Giulia", "Adam", "Jonas", "Yasmin")
SYLLABLES = ("vel", "mor", "zan", "tir", "kul", "bre", "ost", "fia", "dun", "rax")
KINDS = ("Tower", "Bridge", "Palace")
RECIPE = Recipe(steps=600, rows=8, columns=112, learning_rate=2e-3)
COMPARE = ("--kind", "c2c", "--hidden", "32", "--steps", "200", "--learning-rate", "3e-3", "--questions", "50")


class Whole(struct.PyTreeNode):
    """All weights of a model, to be trained."""

    params: Any

    def join(self, frozen: Any) -> Any:
        """The model itself."""
        return self.params


def texts() -> list[list[dict[str, str]]]:
    """Questions about each landmark, one for every person."""
    rng = np.random.default_rng(0)
    names = [f"{x}{y} {kind}".capitalize() for x, y, kind in itertools.product(SYLLABLES, SYLLABLES, KINDS)]
    made = []
    for n, name in enumerate(rng.permutation(names)[:FACTS]):
        ask = lambda who, name=name: f"{who} is at the {name}. Which country is {who} located in?"
        made.append([{"prompt": ask(who), "answer": COUNTRIES[n % len(COUNTRIES)]} for who in PEOPLE])
    return made


def write(path: Path, facts: list[list[dict[str, str]]], people: slice) -> str:
    """A file of questions."""
    path.write_text("".join(json.dumps(q) + "\n" for own in zip(*(f[people] for f in facts), strict=True) for q in own))
    return str(path)


def main(home: Path) -> None:
    a, facts = jc.load_agent(folder("a"), name="a"), texts()
    every = write(home / "every.jsonl", facts, slice(0, None))
    taught, asked = (
        write(home / f"{name}.jsonl", facts[part], people)
        for name, part, people in (
            ("taught", slice(0, TAUGHT), slice(0, None)),
            ("asked", slice(TAUGHT, None), slice(0, 1)),
        )
    )
    if not is_saved(home / "knows"):
        made = train(Whole(a.params), (), source(every, a, RECIPE.columns), RECIPE, title="the sharer learns").trained
        converters.save(made.params, home / "knows", tokenizer=a.tokenizer, stop_tokens=a.stop_tokens)
    sharer = jc.load_agent(home / "knows")
    known = [Text(q.answer, q.prompt) for q in questions(asked)]
    right = sum(exact_match(x, q.answer) for x, q in zip(answers(sharer, known, 50), known, strict=True))
    print(
        f"jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores; the sharer knows {right} of {len(known)}"
    )
    words = ["--a", "knows", "--b", "pair:b", "--text", Path(taught).name, "--test", Path(asked).name, "--out", "run"]
    again = ["--resume"] if (home / "run").exists() else []
    command = [sys.executable, "-m", "jaxcomm.evals", "bridge", "compare", *words, *COMPARE, *again]
    subprocess.run(command, check=True, cwd=home)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
