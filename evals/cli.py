"""The command line: `jaxcomm demo | play | sweep | convert | train-pair`."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Demo:
    """Play both games with the embedded pair: table with intervals and controls, transcripts, layer maps.

    Example: jaxcomm demo --out demo
    """

    out: Path = Path("demo")
    """Folder for layers.png, results.jsonl and items.jsonl."""
    json: Path | None = None
    """Also write one JSON line per result here."""

    def run(self) -> None:
        from jaxcomm.evals.demo import run

        run(self.out, self.json)


@dataclasses.dataclass(frozen=True)
class Play:
    """Play one game under one protocol with any pair of checkpoints.

    Example: jaxcomm play --a meta-llama/Llama-3.2-3B-Instruct --b meta-llama/Llama-3.2-3B-Instruct --game countries --protocol activation --k 26 --j 26
    """

    a: str
    """Sender: a checkpoint folder, a hub id, or pair:a / pair:b for the embedded pair."""
    b: str
    """Receiver, likewise."""
    game: Literal["countries", "tip_sheets"] = "countries"
    protocol: Literal["silent", "skyline", "message", "activation"] = "activation"
    k: int | None = None
    """A's layer, 0 (embedding) to its number of layers; activation only."""
    j: int | None = None
    """B's layer, likewise."""
    graft: Literal["sum", "mean", "replace"] = "replace"
    """How B's state b and A's state a are combined."""
    control: Literal["unrelated", "shuffled", "zero", "noise", "self"] | None = None
    """Graft this instead of A's activation."""
    chat: bool = False
    """Put prompts through each tokenizer's chat template instead of reading them raw."""
    n: int | None = None
    """Number of games; default: the paper's 100 (countries) and 70 (tip_sheets)."""
    seed: int = 0
    """Which games are drawn, and how sampling and noise fall."""
    names: Literal["seen", "new"] = "seen"
    """People and companies the embedded pair has read of, or others."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this share; needs --temperature."""
    ask: str = "{prompt}"
    """Message only: what A reads before it writes. Real models want asking: "{prompt} Tell your partner what you know." """
    tell: str = "{message} {prompt}"
    """Message only: what B reads."""
    max_message_tokens: int = 48
    """Message only: how much A may write."""
    max_new_tokens: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: Path | None = None
    """Write one JSON line with the result here."""
    items: Path | None = None
    """Write one JSON line per game here: tokens read and written, positions, norms."""

    def run(self) -> None:
        import rich

        from jaxcomm.evals.games import GAMES
        from jaxcomm.evals.play import check_file, play, write_lines
        from jaxcomm.generate import Sampling

        check_file(self.json)
        check_file(self.items)
        settings = {}
        if self.temperature < 0 or (self.top_p < 1 and not self.temperature):
            raise ValueError(
                "sampling needs --temperature above 0; without it decoding is greedy and --top-p means nothing"
            )
        if self.protocol != "activation" and (self.k, self.j, self.control, self.graft) != (
            None,
            None,
            None,
            "replace",
        ):
            raise ValueError(
                f"--k, --j, --graft and --control mean nothing to the protocol {self.protocol}: leave them out"
            )
        if self.protocol == "message":
            settings = dict(ask=self.ask, tell=self.tell, max_message_tokens=self.max_message_tokens)
        if self.protocol == "activation":
            if self.k is None or self.j is None:
                raise ValueError("activation needs --k (A's layer) and --j (B's layer)")
            settings = dict(k=self.k, j=self.j, graft=self.graft, control=self.control)

        a, b = load_pair(self.a, self.b, dtype=self.dtype, chat=self.chat)
        games = GAMES[self.game](self.seed, names=self.names, **({} if self.n is None else {"n": self.n}))
        sampling = Sampling(self.temperature, 0, self.top_p) if self.temperature > 0 else None
        outcome = play(
            self.game,
            games,
            self.protocol,
            a,
            b,
            drawn={"games_seed": self.seed, "names": self.names},
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            seed=self.seed,
            **settings,
        )
        result = outcome.summary()
        rich.print(result)
        if self.json is not None:
            write_lines(self.json, [result])
        if self.items is not None:
            write_lines(self.items, outcome.rows())


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Play both games at every layer pair: maps of accuracy and of the answer's log-probability, and what the best layers are
    worth on questions they were not chosen on.

    Example: jaxcomm sweep --a pair:b --b pair:b --out runs/b-b
    """

    a: str
    """Sender: a checkpoint folder, a hub id, or pair:a / pair:b for the embedded pair."""
    b: str
    """Receiver, likewise."""
    out: Path
    """Run folder: every finished chunk, results.parquet, pictures, sweep.html, report.txt."""
    resume: bool = False
    """Go on with the run in the folder."""
    games: tuple[Literal["countries", "tip_sheets"], ...] = ("countries", "tip_sheets")
    ks: tuple[int, ...] | None = None
    """A's layers; default: 1 to its number of layers."""
    js: tuple[int, ...] | None = None
    """B's layers, likewise."""
    grafts: tuple[Literal["sum", "mean", "replace"], ...] = ("replace",)
    decode: int | None = None
    """Also write so many tokens in every cell, and count the texts that are right; else only the answer's tokens are read."""
    text: str | None = None
    """Fit a map W for every (k, j) on this file, one sentence per line, or on "statements": the games' own, of no game."""
    into: int | None = None
    """Fit W into this layer of B instead of the one it is grafted at; needs --text."""
    chat: bool = False
    """Put prompts through each tokenizer's chat template instead of reading them raw."""
    n: int | None = None
    """Number of games; default: the paper's 100 (countries) and 70 (tip_sheets)."""
    seed: int = 0
    """Which games are drawn, and how they are halved."""
    names: Literal["seen", "new"] = "seen"
    """People and companies the embedded pair has read of, or others."""
    memory: float | None = None
    """GiB a device may use beside the weights; default: what is free where the device tells, else 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"

    def run(self) -> None:
        from jaxcomm.evals import sweeps

        if self.into is not None and self.text is None:
            raise ValueError("--into says where W maps to: it needs --text to fit W on")
        if self.decode is not None and self.decode < 1:
            raise ValueError(f"--decode {self.decode}: it must be at least 1")
        a, b = load_pair(self.a, self.b, dtype=self.dtype, chat=self.chat, unroll=False)
        asked = sweeps.Asked(
            games=self.games,
            ks=tuple(sorted(self.ks)) if self.ks is not None else tuple(sweeps.layers(a)),
            js=tuple(sorted(self.js)) if self.js is not None else tuple(sweeps.layers(b)),
            grafts=self.grafts,
            decode=self.decode,
            text=self.text,
            into=self.into,
            n=self.n,
            seed=self.seed,
            names=self.names,
            memory=None if self.memory is None else int(self.memory * 2**30),
        )
        recorded = {"a": self.a, "b": self.b, "chat": self.chat, "dtype": self.dtype}
        sweeps.run(asked, a, b, self.out, resume=self.resume, recorded=recorded)


@dataclasses.dataclass(frozen=True)
class Convert:
    """Read a checkpoint, check every tensor, and write it again as a Hugging Face folder of another dtype.

    Example: jaxcomm convert meta-llama/Llama-3.2-3B-Instruct --out llama-bf16 --dtype bfloat16
    """

    source: Annotated[str, tyro.conf.Positional]
    """A checkpoint folder or hub id."""
    out: Path
    """New folder; it must not exist."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    def run(self) -> None:
        import jax.numpy as jnp
        import rich

        from jaxcomm.converters import agent_from_hf, to_hf

        if self.out.exists():
            raise FileExistsError(f"{self.out} exists: choose another folder, or remove it first")
        agent = agent_from_hf(self.source, getattr(jnp, self.dtype))
        to_hf(agent.params, self.out, tokenizer=agent.tokenizer, stop_tokens=agent.stop_tokens)
        rich.print(f"{self.source} -> {self.out}, {self.dtype}: {agent.params.config}")


@dataclasses.dataclass(frozen=True)
class TrainPair:
    """Train one model of the embedded pair again, from the seed. On CPU: one model per core, both at once.

    Example: jaxcomm train-pair a --out my-a
    """

    model: Annotated[Literal["a", "b"], tyro.conf.Positional]
    """a: the sender, wider and deeper; b: the receiver."""
    out: Path
    """New folder for the checkpoint; it must not exist."""
    steps: int | None = None
    """Default: what the shipped model was trained for."""
    seed: int = 0

    def run(self) -> None:
        from jaxcomm.evals.pair.train import train_and_save

        train_and_save(self.model, self.out, steps=self.steps, seed=self.seed)


def load_pair(a: str, b: str, *, dtype: str, chat: bool, unroll: bool | None = None):
    """Two agents, or one twice; pair:a and pair:b are the embedded ones."""
    import jax.numpy as jnp

    from jaxcomm.converters import agent_from_hf
    from jaxcomm.evals import pair

    def load(name: str):
        path = pair.folder(name.removeprefix("pair:")) if name.startswith("pair:") else name
        return agent_from_hf(path, getattr(jnp, dtype), chat=chat, name=name, unroll=unroll)

    sender = load(a)
    return sender, sender if b == a else load(b)


COMMANDS = {"demo": Demo, "play": Play, "sweep": Sweep, "convert": Convert, "train-pair": TrainPair}


def main() -> None:
    """Exit status 0, or 2 with one line on stderr that says what is wrong and how to mend it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, description="Language models that communicate through activations."
    )
    try:
        command.run()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"jaxcomm: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
