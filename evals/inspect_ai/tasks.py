"""The games as tasks of Inspect AI."""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageUser
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from ..games import Game, Wording, draw
from ..games.wording import Reads

FOR = "agent"
"""Key of a message's metadata that says who reads it: "a" or "b". Without it, both do."""


@task
def game(
    game: str = "countries",
    n: int | None = None,
    seed: int = 0,
    examples: int = 0,
    wording: str = "paper",
    sender_reads: Reads = "statement",
) -> Task:
    """Makes a task from a game, in which A knows something that B is asked about.

    Args:
        game: "countries", "tip_sheets" (both from Ramesh & Li 2025, section 4.1), or a file FILE.jsonl of your own
            (`games.draw`).
        n: Number of items. None: the paper's 100 (countries) and 70 (tip_sheets), or all items of the file.
        seed: Seed of the items.
        examples: Number of worked examples before B's question.
        wording: A key of `games.PRESETS`.
        sender_reads: Contents of A's prompt (`games.wording.Reads`).

    Returns:
        The task. A reply is right if it names the answer, and no other choice before it.

    Raises:
        ValueError: There is no such game or wording; there are too few items; a line of the file is not an item.
        FileNotFoundError: There is no such file.
    """
    return game_task(draw(game, seed, n, examples=examples), Wording(wording, reads=sender_reads))


def game_task(game: Game, wording: Wording) -> Task:
    """Makes a task from a game.

    Args:
        game: The game, such as one drawn from a file (`games.draw`).
        wording: How it is put to the agents.

    Returns:
        The task: its samples' messages are marked for A or B, and `names_answer` scores the replies.

    Raises:
        ValueError: The wording needs an instruction, and the game has none.
    """
    samples = [
        Sample(input=messages(game, wording, n), target=item.answer, choices=list(game.choices(item)), id=n)
        for n, item in enumerate(game.items)
    ]
    return Task(
        dataset=MemoryDataset(samples, name=game.name), solver=generate(), scorer=names_answer(game), name=game.name
    )


def messages(game: Game, wording: Wording, n: int) -> list[ChatMessage]:
    """Writes the agents' messages for an item.

    Args:
        game: The game.
        wording: How it is put to the agents.
        n: Number of the item.

    Returns:
        Messages, marked for A or B (`FOR`).
    """
    item, both = game.items[n], wording.reads != "statement"
    shown: list[ChatMessage] = []
    for example in game.examples:
        asked = f"{wording.told(game, example)} {wording.asked(game, example)}"
        mark = None if both else {FOR: "b"}
        shown += [
            ChatMessageUser(content=asked, metadata=mark),
            ChatMessageAssistant(content=example.answer, metadata=mark),
        ]
    told, asked = wording.told(game, item), wording.asked(game, item)
    last = f"{told} {asked}" if both else told
    return [
        *shown,
        ChatMessageUser(content=last, metadata={FOR: "a"}),
        ChatMessageUser(content=asked, metadata={FOR: "b"}),
    ]


@scorer(metrics=[accuracy(), stderr()])
def names_answer(game: Game) -> Scorer:
    """Makes a scorer: a reply is right if it names the answer, and no other choice before it (`Game.named`).

    Args:
        game: The game whose items are scored.

    Returns:
        The scorer.
    """

    async def score(state: TaskState, target: Target) -> Score:
        reply = state.output.completion
        named = game.named(reply, game.items[int(state.sample_id)])
        return Score(value=CORRECT if named == target.text else INCORRECT, answer=named, explanation=reply)

    return score
