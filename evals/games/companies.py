"""Tip Sheets (section 4.1): A has read the news of three companies, B must invest in one of them.

The paper's prompts are not public. Here a grammar writes the news: one company has good news only (the answer), one has
good news with a catch, one has bad news. The answer depends only on the text: names, order and wording are drawn
independently of the roles.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .world import Item, held_out, world

QUESTION = "You must invest in one company out of {{{options}}}. Which do you invest in?"

GOOD = (  # of one company, of two
    ("has reached a record-high stock price of {n}", "have both reached record-high stock prices of {n}"),
    ("has doubled its profit to {n} million dollars", "have both doubled their profits to {n} million dollars"),
    ("has raised its earnings by {n}%", "have both raised their earnings by {n}%"),
    ("has won new contracts worth {n} million dollars", "have both won new contracts worth {n} million dollars"),
)
BAD = (
    "has taken a nosedive, as its quarterly earnings have dipped {n}%",
    "has issued a profit warning, as its sales have fallen {n}%",
    "has lost {n}% of its value since spring",
    "is closing {n} of its offices after a weak year",
)
CATCH = (
    "is involved in an IP lawsuit with its competitors",
    "is under investigation for fraud",
    "has recalled its main product",
    "faces a strike of its workers",
)


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A tip sheet, and the role of each company in it.

    Attributes:
        text: The news of all three companies.
        buy: The company with good news only. It is the answer.
        watch: The company with good news and a catch.
        sell: The company with bad news.
    """

    text: str
    buy: str
    watch: str
    sell: str

    @property
    def companies(self) -> tuple[str, str, str]:
        """The three companies: to buy, to watch, to sell."""
        return self.buy, self.watch, self.sell


def draw_companies(rng: np.random.Generator, names: str = "seen") -> list[str]:
    """Draws the names of three companies. Their first words differ.

    Args:
        rng: Random generator.
        names: "seen" or "new" first words (`World.stems`).

    Returns:
        The three names.
    """
    stems = rng.choice(world().stems[names], 3, replace=False)
    return [f"{stem} {rng.choice(world().suffixes)}" for stem in stems]


def write_sheet(rng: np.random.Generator, companies: list[str]) -> Sheet:
    """Writes the news of three companies, whose roles are drawn at random.

    Args:
        rng: Random generator.
        companies: The three names.

    Returns:
        The tip sheet.
    """
    buy, watch, sell = (companies[i] for i in rng.permutation(3))
    number = lambda: int(rng.integers(2, 100))
    pick = lambda options: options[rng.integers(len(options))]
    single, both = pick(GOOD)
    bad, catch, short = pick(BAD).format(n=number()), pick(CATCH), watch.split()[0]
    if rng.random() < 0.5:
        first, second = (buy, watch) if rng.random() < 0.5 else (watch, buy)
        clauses = [f"{first} and {second} {both.format(n=number())}, but {short} {catch}", f"{sell} {bad}"]
    else:
        clauses = [
            f"{buy} {single.format(n=number())}",
            f"{watch} {pick(GOOD)[0].format(n=number())}, but {short} {catch}",
            f"{sell} {bad}",
        ]
    first, second, *rest = (clauses[i] for i in rng.permutation(len(clauses)))
    return Sheet(". ".join([first, f"Meanwhile {second}", *rest]) + ".", buy, watch, sell)


def tip_sheets(seed: int = 0, n: int = 70, names: str = "seen") -> list[Item]:
    """Draws items of the game Tip Sheets (Ramesh & Li 2025, section 4.1).

    The three companies of an item never occur together in the training text of the embedded pair (`held_out`).

    Args:
        seed: Seed of the items.
        n: Number of items. Default: 70, as in the paper.
        names: "seen": companies that occur in the embedded pair's training text; "new": other companies.

    Returns:
        The items. Each names its three companies as choices.

    Raises:
        ValueError: There is no such group of names.

    Example:
        >>> item, = tip_sheets(n=1)
        >>> item.choices
        ('Bluewater LLC', 'Mossgate Systems', 'Whistledown Partners')
        >>> item.answer
        'Whistledown Partners'
    """
    rng, items = np.random.default_rng([seed, 2]), []
    if names not in world().stems:
        raise ValueError(f"unknown group of names {names!r}: choose one of {', '.join(world().stems)}")
    while len(items) < n:
        companies = draw_companies(rng, names)
        if held_out(*companies):
            sheet = write_sheet(rng, companies)
            options = tuple(companies[i] for i in rng.permutation(3))
            items.append(Item(sheet.text, QUESTION.format(options=", ".join(options)), sheet.buy, options))
    return items
