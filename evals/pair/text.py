"""Training text of the embedded pair: dialogues about the games' world, never about the games' combinations.

A document is a list of (text, weight) pieces. The weight is the piece's weight in the loss. Unpredictable text (who is
where) has a small weight; text that follows from it (replies and answers) has weight 1.

Kinds of document: a statement and a listener's conclusions, as a list (for a place: country, city and continent, in two of
three cases the country first, else in random order; for news: what to buy first); a statement, then a question;
"Question:", a question, then a statement; a listener's conclusions, then a question; a question without context, answered
with a guess; words said twice. No document involves activations, or is made for passing them on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from ..games.companies import QUESTION as WHICH_COMPANY
from ..games.companies import Sheet, draw_companies, write_sheet
from ..games.places import QUESTION as WHICH_COUNTRY
from ..games.places import STATEMENT
from ..games.world import Landmark, held_out, world

Document = list[tuple[str, float]]
CONTEXT = 0.3

STATEMENTS = (
    STATEMENT,
    "{person} is visiting {place}.",
    "{person} has just arrived at {place}.",
    "{person} is waiting in front of {place}.",
    "This morning {person} took a picture of {place}.",
)
QUESTIONS = {
    "country": (
        WHICH_COUNTRY,
        "Which country is {person} in?",
        "In what country is {person} now?",
        "What country is {person} located in?",
    ),
    "city": (
        "Which city is {person} located in?",
        "Which city is {person} in?",
        "In what city is {person} now?",
        "What city is {person} located in?",
    ),
    "continent": (
        "Which continent is {person} located on?",
        "Which continent is {person} on?",
        "On what continent is {person} now?",
        "What continent is {person} located on?",
    ),
}
INVEST = (
    WHICH_COMPANY,
    "Out of {{{options}}}, which company do you invest in?",
    "Which one do you invest in: {options}?",
)


def arrange(rng: np.random.Generator, statement: str, reply: str, question: str, answer: str, guess: str) -> Document:
    """Arranges one document of a random kind.

    One document in five begins with an unrelated sentence.

    Args:
        rng: Random generator.
        statement: The statement.
        reply: Its conclusions.
        question: A question about it.
        answer: The right answer.
        guess: An answer to the question without the statement.

    Returns:
        The document: pieces of text with their weights in the loss.
    """
    document: Document = []
    if rng.random() < 0.2:
        document.append((str(rng.choice(world().filler)), CONTEXT))
    match rng.choice(6, p=(0.28, 0.16, 0.2, 0.08, 0.16, 0.12)):
        case 0:
            document += [(statement, CONTEXT), (reply, 1.0)]
        case 1:
            document += [(statement, CONTEXT), (question, CONTEXT), (answer, 1.0)]
        case 2:
            document += [("Question:", CONTEXT), (question, CONTEXT), (statement, CONTEXT), (answer, 1.0)]
        case 3:
            document += [(statement, CONTEXT), (reply, 1.0), (question, CONTEXT), (answer, 1.0)]
        case 4:
            document += [(reply, CONTEXT), (question, CONTEXT), (answer, 1.0)]
        case 5:
            document += [(question, CONTEXT), (guess, 0.5)]
    return document


def place_statement(rng: np.random.Generator) -> tuple[str, str, Landmark]:
    """Draws a sentence that says where a person is. This combination of person and place occurs in no game.

    Args:
        rng: Random generator.

    Returns:
        The sentence, the person, and the landmark.
    """
    w = world()
    landmark = w.landmarks[rng.integers(len(w.landmarks))]
    person = str(rng.choice(_visitors(landmark.name)))
    return str(rng.choice(STATEMENTS)).format(person=person, place=landmark.phrase), person, landmark


@functools.cache
def _visitors(place: str) -> np.ndarray:
    """People who may be at this place in the training text."""
    return np.array([person for person in world().names["seen"] if not held_out(person, place)])


def company_statement(rng: np.random.Generator) -> Sheet:
    """Draws a tip sheet about three companies that do not occur together in any game."""
    while True:
        companies = draw_companies(rng)
        if not held_out(*companies):
            return write_sheet(rng, companies)


def place_document(rng: np.random.Generator) -> Document:
    """Draws a document about the place of a person. Country, city and continent follow from the statement."""
    statement, person, landmark = place_statement(rng)
    facts = [landmark.country, landmark.city, landmark.continent]
    order = rng.permutation(3) if rng.random() < 0.5 else [0, *(1 + rng.permutation(2))]
    kind = str(rng.choice(list(QUESTIONS), p=(0.5, 0.25, 0.25)))
    other = world().landmarks[rng.integers(len(world().landmarks))]
    return arrange(
        rng,
        statement,
        reply=", ".join(facts[i] for i in order) + ".",
        question=str(rng.choice(QUESTIONS[kind])).format(person=person),
        answer=getattr(landmark, kind),
        guess=getattr(other, kind),
    )


def company_document(rng: np.random.Generator) -> Document:
    """Draws a document with the news of three companies. The text implies which one to buy, watch and sell."""
    sheet = company_statement(rng)
    rest = [f"{sheet.watch} to watch", f"{sheet.sell} to sell"]
    return arrange(
        rng,
        sheet.text,
        reply=", ".join([f"{sheet.buy} to buy", *(rest[i] for i in rng.permutation(2))]) + ".",
        question=str(rng.choice(INVEST)).format(options=", ".join(sheet.companies[i] for i in rng.permutation(3))),
        answer=sheet.buy,
        guess=sheet.companies[rng.integers(3)],
    )


def echo_document(rng: np.random.Generator) -> Document:
    """Draws a document in which words are repeated.

    This is the simplest text for which attention to earlier tokens helps. From it the model learns to copy.

    Args:
        rng: Random generator.

    Returns:
        The document.
    """
    while True:
        companies = [
            f"{stem} {rng.choice(world().suffixes)}" for stem in rng.choice(world().stems["seen"], 4, replace=False)
        ]
        if not any(held_out(*three) for three in itertools.combinations(companies, 3)):
            said = ", ".join([*companies, *rng.choice(world().names["seen"], 3, replace=False)]) + "."
            return [(said, CONTEXT), (said, 1.0)]


DOCUMENTS = {"places": place_document, "companies": company_document, "echo": echo_document}


def documents(kind: str, seed: int) -> Iterator[Document]:
    """Draws documents of one kind without end.

    Args:
        kind: A key of `DOCUMENTS`.
        seed: Seed of the documents.

    Yields:
        The documents.
    """
    rng = np.random.default_rng([seed, list(DOCUMENTS).index(kind)])
    while True:
        yield DOCUMENTS[kind](rng)


def statements(game: str, seed: int) -> Iterator[str]:
    """Draws statements of the kind that A reads in a game, without end. None of them belongs to an item of a game.

    Args:
        game: "countries" or "tip_sheets".
        seed: Seed of the statements.

    Yields:
        The statements.
    """
    rng = np.random.default_rng([seed, 9])
    while True:
        yield place_statement(rng)[0] if game == "countries" else company_statement(rng).text


def plain(document: Document) -> str:
    """Joins the pieces of a document into one text."""
    return " ".join(text for text, _ in document)
