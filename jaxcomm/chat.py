"""A conversation with one agent, turn by turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxcomm.agent import Agent


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

    def say(self, text: str, **how: Any) -> str:
        """The user's turn, and the agent's, which is returned whole.

        Args:
            text: What the user says.
            **how: What `Agent.stream` takes besides the prompt.
        """
        return "".join(self.stream(text, **how)).strip()

    def stream(self, text: str, **how: Any) -> Iterator[str]:
        """The user's turn, and the agent's, piece by piece. What was said stays in `turns` once it is whole.

        Args:
            text: What the user says.
            **how: What `Agent.stream` takes besides the prompt.

        Yields:
            What is new in the agent's turn.
        """
        asked: list[Any] = [*self.turns, {"role": "user", "content": text}]
        pieces = []
        for piece in self.agent.stream(asked, **how):
            pieces.append(piece)
            yield piece
        self.turns = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]
