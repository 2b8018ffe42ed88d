"""Tip Sheets (section 4.1): A has read the news of three companies, B must invest in one of them.

The paper's prompts are not public. Here a grammar writes the news: one company has good news only (the answer), one has
good news with a catch, one has bad news. The answer follows from the text, and from nothing else: names, order and
wording are drawn independently of the roles.
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
    """A tip sheet and the part each company plays in it."""

    text: str
    buy: str
    watch: str
    sell: str

    @property
    def companies(self) -> tuple[str, str, str]:
        return self.buy, self.watch, self.sell


def draw_companies(rng: np.random.Generator, names: str = "seen") -> list[str]:
    """Three companies with different first words."""
    stems = rng.choice(world().stems[names], 3, replace=False)
    return [f"{stem} {rng.choice(world().suffixes)}" for stem in stems]


def write_sheet(rng: np.random.Generator, companies: list[str]) -> Sheet:
    """News of three companies, roles drawn at random."""
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
    """n games over triples of companies that no training text brings together. `names`: "seen" or "new" companies."""
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
