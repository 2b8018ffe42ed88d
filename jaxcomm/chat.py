"""A conversation with one agent, turn by turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxcomm.agent import Agent


@dataclasses.dataclass
class Chat:
    """A conversation. The agent should use a chat template (`Agent.chat`).

    Attributes:
        agent: The agent that answers.
        turns: All turns so far, in the format of chat templates.

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
        """Adds a user turn and the agent's reply, and returns the reply.

        Args:
            text: The user's text.
            **how: Arguments of `Agent.stream` besides the prompt.

        Returns:
            The agent's reply, without surrounding space.

        Raises:
            ValueError: As for `Agent.stream`.
            FloatingPointError: The logits are NaN.
        """
        return "".join(self.stream(text, **how)).strip()

    def stream(self, text: str, **how: Any) -> Iterator[str]:
        """Adds a user turn and the agent's reply, and yields the reply piece by piece.

        Both turns are added to `turns` when the reply is complete.

        Args:
            text: The user's text.
            **how: Arguments of `Agent.stream` besides the prompt.

        Yields:
            New text of the agent's reply.

        Raises:
            ValueError: As for `Agent.stream`.
            FloatingPointError: The logits are NaN.
        """
        asked: list[Any] = [*self.turns, {"role": "user", "content": text}]
        pieces = []
        for piece in self.agent.stream(asked, **how):
            pieces.append(piece)
            yield piece
        self.turns = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]
