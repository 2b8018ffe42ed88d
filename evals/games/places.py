"""Countries (section 4.1): A knows where somebody is, B is asked for the country.

The paper's prompts are not public; the example it prints gives the wording.
"""

import numpy as np

from .world import Item, held_out, world

STATEMENT = "{person} is at {place}."
QUESTION = "Which country is {person} located in?"


def countries(seed: int = 0, n: int = 100, names: str = "seen") -> list[Item]:
    """n games, no landmark twice while there are enough. `names`: "seen" people, or "new" ones the embedded pair has
    never read of. ValueError for another group."""
    w, rng = world(), np.random.default_rng([seed, 1])
    if names not in w.names:
        raise ValueError(f"unknown group of names {names!r}: choose one of {', '.join(w.names)}")
    items = []
    while len(items) < n:
        for index in rng.permutation(len(w.landmarks))[: n - len(items)]:
            landmark = w.landmarks[index]
            person = str(rng.choice([p for p in w.names[names] if held_out(p, landmark.name)]))
            statement = STATEMENT.format(person=person, place=landmark.phrase)
            items.append(Item(statement, QUESTION.format(person=person), landmark.country))
    return items
