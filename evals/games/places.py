"""Countries (section 4.1): A knows where a person is, B is asked for the country.

The paper's prompts are not public. The wording follows the example that it prints.
"""

import numpy as np

from .world import Item, held_out, world

STATEMENT = "{person} is at {place}."
QUESTION = "Which country is {person} located in?"


def countries(seed: int = 0, n: int = 100, names: str = "seen") -> list[Item]:
    """Draws items of the game Countries (Ramesh & Li 2025, section 4.1).

    A landmark is repeated only after all landmarks have been used. The person and the landmark of an item never occur
    together in the training text of the embedded pair (`held_out`).

    Args:
        seed: Seed of the items.
        n: Number of items. Default: 100, as in the paper.
        names: "seen": people who occur in the embedded pair's training text; "new": other people.

    Returns:
        The items, without their own choices.

    Raises:
        ValueError: There is no such group of names.

    Example:
        >>> item, = countries(n=1)
        >>> item.prompt_a, item.prompt_b, item.answer
        ("Giulia is at Saint Basil's Cathedral.", 'Which country is Giulia located in?', 'Russia')
    """
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
