"""Training texts of networks and bridges: their sources, and their tokens.

two-places, two-hop         questions about the games' world that the embedded pair was not trained for, endless
countries                   the game's questions, with the statement that only a sharer reads (`jaxcomm bridge`), endless
FILE                        texts, separated by empty lines
FILE.jsonl                  a JSON object per line: a "text"; or a "prompt" and an "answer" (only the answer is learned),
                            with an optional "told", the text for a sharer
hub:NAME:CONFIG:SPLIT:FIELD a data set of the Hugging Face hub, streamed; needs jaxcomm[eval]
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.alignment import PADDING
from jaxcomm.training import Document

from ..files import json_lines, read_text
from ..games.places import QUESTION, STATEMENT
from ..games.world import Landmark, held_out, world
from ..sentences import stream


class Text(NamedTuple):
    """A text to learn, or an answer to learn after a prompt.

    Attributes:
        answer: The text to learn.
        prompt: Text before it, which is not learned. Empty: none.
        told: Text for a sharer. Empty: none.
    """

    answer: str
    prompt: str = ""
    told: str = ""


Source = Callable[[int], Iterator[Document]]
"""source(n) yields the texts as tokens from the n-th on. Repeated calls yield the same."""


def source(
    name: str,
    agent: Agent,
    columns: int,
    *,
    n: int | None = None,
    seed: int = 0,
    sharer: Agent | None = None,
    aligned: bool = False,
) -> Source:
    """Opens a source of texts, and turns its texts into tokens.

    Texts are cut into pieces of at most `columns` tokens. Their order is random, given by `seed`. After all texts have been
    read, they are read again in another order; n texts of the hub are read again in the same order.

    Args:
        name: "two-places", "two-hop" or "countries" (questions of this module), a file, or
            hub:NAME:CONFIG:SPLIT:FIELD.
        agent: The agent whose tokenizer is used.
        columns: Largest number of tokens of a piece.
        n: Number of texts to use. None: all of them.
        seed: Random seed for the order, and for the questions.
        sharer: The agent that reads `Text.told`. None: no sharer.
        aligned: Whether the sharer reads the prompt instead, with its tokens aligned to the agent's (`Agent.align`).

    Returns:
        A function of n that yields the tokens from the n-th text on. It yields the same on every call.

    Raises:
        ValueError: The source has no such field, is empty, or has fewer than n texts; a prompt with its answer is longer
            than `columns` (these are not cut); a text has no text for the sharer.
        OSError: The source does not exist or cannot be read.
    """
    if name.startswith("hub:"):
        if sharer is not None:
            raise ValueError(
                f"{name} has nothing that only a sharer reads: give FILE.jsonl with told, prompt and answer"
            )
        if next(_endless(name, agent, columns, n, seed), None) is None:
            raise ValueError(f"{name} holds no text of two tokens: there is nothing to learn")
        return lambda start: itertools.islice(_endless(name, agent, columns, n, seed), start, None)
    ask, document = (QUESTIONS | PRIVATE).get(name), functools.partial(_document, agent, sharer=sharer, aligned=aligned)
    if ask and n is None:
        for i in range(100):  # find texts that are too long before training
            next(_pieces(document(ask(seed, i)), columns))
        return lambda start: (document(ask(seed, i)) for i in itertools.count(start))
    texts = [ask(seed, i) for i in range(n or 0)] if ask else _file(name)
    if n is not None and len(texts) < n:
        raise ValueError(f"{name} has {len(texts)} texts, {n} were asked for: ask for fewer or name more text")
    documents = [piece for text in texts[:n] for piece in _pieces(document(text), columns)]
    if not documents:
        raise ValueError(f"{name} holds no text of two tokens: there is nothing to learn")

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, 7, epoch]).permutation(len(documents))

    def read(start: int) -> Iterator[Document]:
        for i in itertools.count(start):
            epoch, at = divmod(i, len(documents))
            yield documents[order(epoch)[at]]

    return read


def two_places(seed: int, n: int, *, test: bool = False) -> Text:
    """Writes the n-th question about two people: in which countries are they?

    Args:
        seed: Seed of the questions.
        n: Number of the question.
        test: Whether it is a test question. Its combinations occur in no training question.

    Returns:
        The question and its answer, both countries in order.

    Example:
        >>> two_places(0, 0).answer
        'Italy and India'
    """
    people, places, _ = _two_statements(seed, n, test)
    told = " ".join(f"{person} is at {place.phrase}." for person, place in zip(people, places, strict=False))
    return Text(f"{places[0].country} and {places[1].country}", f"{told} Which countries are they located in?")


def two_hop(seed: int, n: int, *, test: bool = False) -> Text:
    """Writes the n-th question about a person who is with one of two people. The text tells the places of these two.

    Args:
        seed: Seed of the questions.
        n: Number of the question.
        test: Whether it is a test question. Its combinations occur in no training question.

    Returns:
        The question and its answer, a country.
    """
    people, places, which = _two_statements(seed, n, test)
    told = " ".join(f"{person} is at {place.phrase}." for person, place in zip(people, places, strict=False))
    asked = f"{people[2]} is with {people[which]}. Which country is {people[2]} located in?"
    return Text(places[which].country, f"{told} {asked}")


QUESTIONS = {"two-places": two_places, "two-hop": two_hop}
"""Sources of questions. As in the games, the combinations of a test (`held_out`) occur in no training text."""


def told_country(seed: int, n: int, *, test: bool = False) -> Text:
    """Writes the n-th question of the game Countries, with the statement for a sharer.

    Args:
        seed: Seed of the questions.
        n: Number of the question.
        test: Whether it is a test question. Its combinations occur in no training question.

    Returns:
        The question, its answer, and the statement.

    Example:
        >>> told_country(0, 0)
        Text(answer='Netherlands', prompt='Which country is Nora located in?', told='Nora is at the Dom Tower of Utrecht.')
    """
    rng, w = np.random.default_rng([seed, n, int(test), 2]), world()
    place = w.landmarks[int(rng.integers(len(w.landmarks)))]
    person = str(rng.choice([p for p in w.names["seen"] if held_out(p, place.name) == test]))
    return Text(place.country, QUESTION.format(person=person), STATEMENT.format(person=person, place=place.phrase))


PRIVATE = {"countries": told_country}
"""Sources of questions whose answer follows from a text that only a sharer reads."""


def _two_statements(seed: int, n: int, test: bool) -> tuple[list[str], list[Landmark], int]:
    """Three people, the places of the first two, in different countries, and one of the two."""
    rng = np.random.default_rng([seed, n, int(test)])
    people, places = [str(p) for p in rng.choice(world().names["seen"], 3, replace=False)], []
    for person in people[:2]:
        every = (world().landmarks[i] for i in rng.permutation(len(world().landmarks)))
        taken = {place.country for place in places}
        places.append(next(m for m in every if m.country not in taken and held_out(person, m.name) == test))
    return people, places, int(rng.integers(2))


def questions(name: str) -> list[Text]:
    """Reads a file of questions.

    Args:
        name: FILE.jsonl with a "prompt" and an "answer" on each line.

    Returns:
        The questions, in the order of the file.

    Raises:
        ValueError: A line is not such an object, or the file has none.
        FileNotFoundError: There is no such file.
    """
    texts = _file(name)
    if not texts or not all(text.prompt for text in texts):
        raise ValueError(f'{name} must hold questions: a "prompt" and an "answer" per line, as .jsonl')
    return texts


def _document(agent: Agent, text: Text, sharer: Agent | None = None, aligned: bool = False) -> Document:
    """Token ids and their weights (0 for a prompt), with an end token: end of text, or end of turn after a prompt. Also the
    sharer's tokens (aligned: its tokens of the prompt, and the agent's tokens that they correspond to)."""
    if sharer is not None and aligned and text.prompt:
        ids, weights = _document(agent, text)[:2]
        told, found = sharer.encode(text.prompt), sharer.align(agent, [text.prompt])[0]
        found = found[found != PADDING] - (sharer.tokenize([text.prompt]).shape[1] - len(told))
        return ids, weights, told, [*np.maximum(found, -1).tolist(), *[-1] * (len(ids) - len(found))]
    if sharer is not None and not aligned:
        if not (text.told and text.prompt):
            raise ValueError(
                f'{(text.prompt or text.answer)[:60]!r} has nothing that only the sharer reads: give "told"'
            )
        ids, weights = _document(agent, text)[:2]
        return ids, weights, sharer.encode(text.told)
    if not text.prompt:
        ids = [*agent.tokenizer.encode(text.answer), *agent.stop_tokens[:1]]
        return ids, [1.0] * len(ids)
    asked, answered = agent.encode(text.prompt), [*agent.follow(text.prompt, f" {text.answer}"), *_turn_end(agent)]
    return [*asked, *answered], [0.0] * len(asked) + [1.0] * len(answered)


def _turn_end(agent: Agent) -> tuple[int, ...]:
    """The stop token that the chat template writes after an assistant's turn, or else the end-of-text token."""
    if agent.tokenizer.chat_template:
        turns = [{"role": role, "content": said} for role, said in (("user", "1"), ("assistant", "2ND"), ("user", "3"))]
        after = dataclasses.replace(agent, chat=True).render(turns).partition("2ND")[2]
        for token in agent.tokenizer.encode(after, add_special_tokens=False):
            if token in agent.stop_tokens:
                return (token,)
    return agent.stop_tokens[:1]


def _pieces(document: Document, columns: int) -> Iterator[Document]:
    """Split a text into parts that fit a row. A last part of a single token is dropped, since it predicts nothing.
    ValueError: the text has a prompt and does not fit."""
    ids, weights, *told = document
    if (most := max(len(ids), *map(len, told), 0)) > columns and not weights[0]:
        raise ValueError(
            f"a prompt and its answer, or what is told, take {most} tokens, and rows hold {columns}: make rows longer (--columns)"
        )
    if told:
        yield document
        return
    for at in range(0, len(ids), columns):
        if len(ids[at : at + columns]) > 1:
            yield ids[at : at + columns], weights[at : at + columns]


def _file(name: str) -> list[Text]:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} is no file: name one, or {' or '.join(QUESTIONS | PRIVATE)}, or hub:NAME:CONFIG:SPLIT:FIELD"
        )
    if path.suffix != ".jsonl":
        return [Text(part.strip()) for part in read_text(path).split("\n\n") if part.strip()]
    texts = []
    for where, record in json_lines(path):
        text, prompt, answer, told = (record.get(field) for field in ("text", "prompt", "answer", "told"))
        if isinstance(text, str) and text:
            texts.append(Text(text))
        elif isinstance(prompt, str) and isinstance(answer, str) and prompt and answer.strip():
            texts.append(Text(answer.strip(), prompt, told if isinstance(told, str) else ""))
        else:
            raise ValueError(f'{where} has neither a "text" nor a "prompt" and an "answer": {", ".join(record)}')
    return texts


def _endless(name: str, agent: Agent, columns: int, n: int | None, seed: int) -> Iterator[Document]:
    """Read a stream again and again. A stream has no random access, so a resumed run reads it from the beginning."""
    for epoch in itertools.count():
        empty = True
        for text in itertools.islice(stream(name, seed if n else seed + epoch), n):
            for piece in _pieces(_document(agent, Text(text)), columns):
                yield piece
                empty = False
        if empty:
            return
