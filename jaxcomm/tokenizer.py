"""What an `Agent` asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxcomm.config import AnyArray


class Tokenizer(Protocol):
    """What an agent asks of a tokenizer. transformers' fast ones have it."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    all_special_tokens: list[str]
    all_special_ids: list[int]
    backend_tokenizer: Any

    def __call__(self, text: str, **how: Any) -> Mapping[str, Any]:
        """Ids, and where in the text each token stands."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int] | AnyArray, skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        """Each token as it is spelled in the vocabulary."""
        ...

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Spelled tokens as text."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Every token."""
        ...

    def get_added_vocab(self) -> dict[str, int]:
        """Those that were added to the trained ones."""
        ...

    def get_chat_template(self) -> str:
        """The template in use."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **how: Any) -> str:
        """A conversation as text."""
        ...
