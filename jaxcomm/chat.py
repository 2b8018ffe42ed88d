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
        agent: The agent that answers.
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
        """Adds a turn of the user's and one of the agent's, and returns the agent's whole.

        Args:
            text: What the user says.
            **how: What `Agent.stream` takes besides the prompt.

        Returns:
            What the agent says, without surrounding space.

        Raises:
            ValueError: As for `Agent.stream`.
        """
        return "".join(self.stream(text, **how)).strip()

    def stream(self, text: str, **how: Any) -> Iterator[str]:
        """Adds a turn of the user's and one of the agent's, and yields the agent's piece by piece.

        Both turns stay in `turns` once the agent's is whole.

        Args:
            text: What the user says.
            **how: What `Agent.stream` takes besides the prompt.

        Yields:
            New text of the agent's turn.

        Raises:
            ValueError: As for `Agent.stream`.
        """
        asked: list[Any] = [*self.turns, {"role": "user", "content": text}]
        pieces = []
        for piece in self.agent.stream(asked, **how):
            pieces.append(piece)
            yield piece
        self.turns = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]
