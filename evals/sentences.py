"""Sentences for fitting maps W: their sources, and their tokens for two models.

    statements:countries, statements:tip_sheets   statements like A's in that game, but from none of its items
    statements:FILE.jsonl                         A's statements in a game of your own
    FILE                                          a sentence per line
    FILE.jsonl, FILE.jsonl:FIELD                  a JSON object per line, with the sentence in FIELD (default: text)
    hub:NAME:CONFIG:SPLIT:FIELD                   a data set of the Hugging Face hub, streamed; needs jaxcomm[eval]

The paper's W is fitted on 3072 sentences of hub:allenai/c4:en:train:text, its in-distribution W (appendix B.3) on
hub:openai/gsm8k:main:train:question.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcomm.agent import Agent

from .files import json_lines, read_text
from .games import GAMES
from .games.game import read_items
from .pair.text import statements

PAPER = 3072
LONGEST = 1000
"""Number of characters. A hub's record is often a whole document; it is cut at the last end of a sentence within this."""
DRAWN_FROM = 10_000
"""Size of the shuffle buffer for a streamed data set of the hub."""
BATCH = 40
INSTEAD = "or name a local file with a sentence per line"


def sentences(source: str, n: int | None = None, *, seed: int = 0) -> list[str]:
    """Reads n sentences from a source.

    Args:
        source: The source: statements:GAME, a file, or hub:NAME:CONFIG:SPLIT:FIELD (see the module docstring).
        n: Number of sentences. Default: all of a file; for other sources 3072, as in Ramesh & Li (2025).
        seed: Random seed for the choice of sentences. Sentences from a file stay in its order.

    Returns:
        The sentences.

    Raises:
        ValueError: The source has no such field, or fewer than n sentences.
        OSError: The source does not exist or cannot be read.

    Example:
        >>> sentences("statements:countries", 2)
        ['Yasmin is visiting Charles Bridge.', 'Priya is visiting the Hobbiton Movie Set.']
    """
    kind, _, rest = source.partition(":")
    if kind == "statements":
        found = list(itertools.islice(_statements(rest, seed), PAPER if n is None else n))
    elif kind == "hub":
        found = list(itertools.islice(_hub(source, seed), PAPER if n is None else n))
    else:
        found = _file(source)
        if n is not None and n < len(found):
            rows = np.sort(np.random.default_rng(seed).choice(len(found), n, replace=False))
            found = [found[i] for i in rows]
    if n is not None and len(found) < n:
        raise ValueError(f"{source} has {len(found)} sentences, {n} were asked for: ask for fewer or name more text")
    return found


def read_both(a: Agent, b: Agent, sentences: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Turns sentences into prompts of both agents, in batches of at most 40.

    All batches are padded to the same length, so each model needs one program.

    Args:
        a: The sender.
        b: The receiver.
        sentences: The sentences.

    Yields:
        The prompts of A and of B [n, P] for the same n sentences, as input of `jaxcomm.fit_maps`.
    """
    both = [agent.tokenize(sentences) for agent in (a, b)]
    for rows in np.split(np.arange(len(sentences)), range(BATCH, len(sentences), BATCH)):
        yield both[0][rows], both[1][rows]


def read_aligned(a: Agent, b: Agent, sentences: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Turns sentences into prompts of both agents like `read_both`, with an alignment of their tokens.

    Args:
        a: The sender.
        b: The receiver.
        sentences: The sentences.

    Yields:
        The prompts of A and of B; if their tokenizers differ, also A's token for each of B's. Input of
        `jaxcomm.fit_kv_maps`.
    """
    columns = None if a.tokenizer.get_vocab() == b.tokenizer.get_vocab() else a.align(b, sentences)
    rows = 0
    for one, other in read_both(a, b, sentences):
        rows, begin = rows + len(one), rows
        yield (one, other) if columns is None else (one, other, columns[begin:rows])


def _statements(game: str, seed: int) -> Iterator[str]:
    if game.endswith(".jsonl"):
        return iter([item.prompt_a for item in read_items(Path(game))])
    if game not in GAMES:
        raise ValueError(f"statements:{game}: there is no such game, only {', '.join(GAMES)} and files, FILE.jsonl")
    return statements(game, seed)


def _file(source: str) -> list[str]:
    path, colon, field = source.rpartition(".jsonl:")
    name, field = (f"{path}.jsonl", field) if colon else (source, "text")
    if not Path(name).is_file():
        raise FileNotFoundError(
            f"{name} is no file: name one with a sentence per line, a .jsonl, statements:countries, "
            "statements:tip_sheets or hub:NAME:CONFIG:SPLIT:FIELD"
        )
    if name.endswith(".jsonl"):
        lines = [_field(record, field, name).strip() for _, record in json_lines(Path(name))]
    else:
        lines = [line.strip() for line in read_text(Path(name)).split("\n")]
    return [line for line in lines if line]


def _field(record: dict[str, Any], field: str, source: str) -> str:
    if not isinstance(record.get(field), str):
        raise ValueError(f"{source} has no text in a field {field!r}: its fields are {', '.join(map(str, record))}")
    return record[field]


def stream(source: str, seed: int) -> Iterator[str]:
    """Streams the texts of a data set of the Hugging Face hub.

    Args:
        source: The data set, hub:NAME:CONFIG:SPLIT:FIELD.
        seed: Seed of the order.

    Yields:
        The non-empty texts.

    Raises:
        ValueError: The source is not written in this form, or has no such field; jaxcomm[eval] is not installed.
        OSError: The data set cannot be read.
    """
    if source.count(":") != 4:
        raise ValueError(f"{source}: write hub:NAME:CONFIG:SPLIT:FIELD, such as hub:openai/gsm8k:main:train:question")
    _, name, config, split, field = source.split(":")
    for record in _records(source, name, config, split, seed):
        if text := _field(record, field, source).strip():
            yield text


def revision(source: str) -> str | None:
    """Finds the current commit of a data set of the hub.

    Args:
        source: A source of sentences.

    Returns:
        The commit. None: the source is not on the hub.

    Raises:
        OSError: The hub cannot be reached, or has no such data set.
    """
    if not source.startswith("hub:"):
        return None
    import huggingface_hub

    try:
        return huggingface_hub.dataset_info(source.split(":")[1]).sha
    except Exception as error:  # includes the HTTP client's errors
        raise OSError(f"{source} cannot be read ({error}): check its name and the network, {INSTEAD}") from error


def _hub(source: str, seed: int) -> Iterator[str]:
    """`stream`, with long texts cut at the end of a sentence. Long texts without a sentence end are left out."""
    for text in stream(source, seed):
        if len(text) <= LONGEST:
            yield text
        elif longest := re.match(rf"(?s).{{1,{LONGEST - 1}}}[.!?](?=\s)", text):
            yield longest[0]


def _records(source: str, name: str, config: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{source} needs the package datasets: pip install 'jaxcomm[eval]', {INSTEAD}") from None
    try:
        stream = load_dataset(name, config or None, split=split, streaming=True)
        yield from stream.shuffle(seed=seed, buffer_size=DRAWN_FROM)
    except Exception as error:  # HTTP clients and file formats all have their own error types
        raise OSError(f"{source} cannot be read ({error}): check its name and the network, {INSTEAD}") from error
