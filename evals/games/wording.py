"""How a game is put to the agents: templates, instructions, worked examples, and the contents of the sender's prompt."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jaxcomm.agent import Agent, Prompt

from .game import Game, Item

Reads = Literal["statement", "statement+question"]
"""Contents of A's prompt before it sends: only the statement, or the statement and B's question. With the question, A's last
state may encode the answer."""
_KVCOMM = "Instruction: Directly answer the question based on the context passage, no explanation is needed. {hint}"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Templates for the prompts of A and B.

    A template may contain {statement}, {question}, and the game's own {instruction} and {hint}.

    Attributes:
        sender: Template for A's prompt.
        receiver: Template for B's prompt.
        told: A description of the preset, for reports.
    """

    sender: str
    receiver: str
    told: str


PRESETS: dict[str, Preset] = {
    "paper": Preset(
        "{statement}", "{question}", "Ramesh & Li (2025), section 4.1: the bare statement and the bare question"
    ),
    "instructed": Preset(
        "{statement}", "{question} {instruction}", "the question with an instruction on the answer's form"
    ),
    "kvcomm": Preset(
        _KVCOMM + "Context: {statement}",
        _KVCOMM + "Question: {question}",
        "KVComm (arXiv 2510.03346): an instruction before the context, and before the question",
    ),
}


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a game is put to the agents.

    If the game has worked examples (`Game.examples`), B reads each of them as statement, question and answer. A reads them
    too if it reads the question.

    Attributes:
        preset: A key of `PRESETS`.
        instruction: An instruction instead of the game's own. Games from a file have no instruction.
        reads: A's prompt in protocols in which it sends: the statement, or the statement and B's question.

    Raises:
        ValueError: There is no such preset; the preset has no place for an instruction; `reads` has another value.

    Example:
        >>> from jaxcomm.evals import games
        >>> game = games.draw("countries", n=1)
        >>> Wording("instructed").asked(game, game.items[0])
        "Which country is Giulia located in? Answer with the country's name only."
    """

    preset: str = "paper"
    instruction: str | None = None
    reads: Reads = "statement"

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"unknown wording {self.preset!r}: choose one of {', '.join(PRESETS)}")
        if self.instruction is not None and "{instruction}" not in PRESETS[self.preset].receiver:
            raise ValueError(f"only the wording instructed takes an instruction, {self.preset} does not")
        if self.reads not in get_args(Reads):
            raise ValueError(f"the sender reads {self.reads!r}: choose one of {', '.join(get_args(Reads))}")

    def told(self, game: Game, item: Item) -> str:
        """Writes the statement of an item for A.

        Args:
            game: The game.
            item: One of its items.

        Returns:
            The text.

        Raises:
            ValueError: The preset needs an instruction, and there is none.
        """
        return self._fill(PRESETS[self.preset].sender, game, item)

    def asked(self, game: Game, item: Item) -> str:
        """Writes the question of an item for B.

        Args:
            game: The game.
            item: One of its items.

        Returns:
            The text.

        Raises:
            ValueError: The preset needs an instruction, and there is none.
        """
        return self._fill(PRESETS[self.preset].receiver, game, item)

    def _fill(self, template: str, game: Game, item: Item) -> str:
        instruction = game.instruction if self.instruction is None else self.instruction
        if "{instruction}" in template and not instruction:
            raise ValueError(
                f"{game.name} has no instruction of its own: give one, or another wording than {self.preset}"
            )
        hint = f"{game.hint} " if game.hint else ""
        return template.format(statement=item.prompt_a, question=item.prompt_b, instruction=instruction, hint=hint)

    def prompts_a(self, game: Game, a: Agent, *, sends: bool = True) -> list[Prompt]:
        """Writes A's prompts.

        Args:
            game: The game.
            a: The agent A.
            sends: Whether A sends a message. If so, it may read the question (`reads`). Under the protocol "skyline" A
                sends nothing: B reads the statement itself.

        Returns:
            The prompt of each item.

        Raises:
            ValueError: The preset needs an instruction, and there is none.
        """
        if not sends or self.reads == "statement":
            return [_conversation([], self.told(game, item), a) for item in game.items]
        return [_conversation(self._examples(game), self._both(game, item), a) for item in game.items]

    def prompts_b(self, game: Game, b: Agent) -> list[Prompt]:
        """Writes B's prompts.

        Args:
            game: The game.
            b: The agent B.

        Returns:
            The prompt of each item: the worked examples, if there are any, and the question.

        Raises:
            ValueError: The preset needs an instruction, and there is none.
        """
        return [_conversation(self._examples(game), self.asked(game, item), b) for item in game.items]

    def writer(self, game: Game, agent: Agent) -> Agent:
        """Sets an agent's stop tokens.

        A raw worked example is one line. If there are such examples, the agent also stops at the end of a line.

        Args:
            game: The game.
            agent: The agent.

        Returns:
            The agent, with further stop tokens if needed.
        """
        if agent.chat or not game.examples:
            return agent
        return dataclasses.replace(agent, stop_tokens=tuple(dict.fromkeys((*agent.stop_tokens, *agent.line_ends))))

    def _both(self, game: Game, item: Item) -> str:
        return f"{self.told(game, item)} {self.asked(game, item)}"

    def _examples(self, game: Game) -> list[tuple[str, str]]:
        return [(self._both(game, item), item.answer) for item in game.examples]


def _conversation(examples: list[tuple[str, str]], last: str, agent: Agent) -> Prompt:
    """One prompt. It is a conversation only if there are examples before it. Protocols put messages into its last turn."""
    if not examples:
        return last
    turns = [
        (("user", asked), ("assistant", answer)) if agent.chat else (("user", f"{asked} {answer}"),)
        for asked, answer in examples
    ]
    return [{"role": who, "content": text} for example in (*turns, (("user", last),)) for who, text in example]
