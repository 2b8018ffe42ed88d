"""A conversation with one agent, turn by turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Unpack

from jaxcomm.agent import Agent, Seed
from jaxcomm.decoding import Decoding


@dataclasses.dataclass
class Chat:
    """A conversation. The agent should read its prompts through a chat template (`Agent.chat`).

    Attributes:
        agent: Who answers.
        turns: What was said, as chat templates take it.

    Example:
        >>> chat = jc.Chat(agent)
        >>> chat.say("Bob is at Petra. Which country is Bob located in?", max_new_tokens=8)
        'Jordan'
        >>> len(chat.turns)
        2
    """

    agent: Agent
    turns: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def say(self, text: str, *, seed: Seed = 0, **decoding: Unpack[Decoding]) -> str:
        """The user's turn, and the agent's, which is returned whole (`Agent.stream` has the arguments)."""
        return "".join(self.stream(text, seed=seed, **decoding)).strip()

    def stream(self, text: str, *, seed: Seed = 0, **decoding: Unpack[Decoding]) -> Iterator[str]:
        """The user's turn, and the agent's, piece by piece. What was said stays in `turns` once it is whole."""
        asked: list[Any] = [*self.turns, {"role": "user", "content": text}]
        pieces = []
        for piece in self.agent.stream(asked, seed=seed, **decoding):
            pieces.append(piece)
            yield piece
        self.turns = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]
