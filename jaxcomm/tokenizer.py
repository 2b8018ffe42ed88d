"""The tokenizer interface that `Agent` needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxcomm.config import AnyArray


class Tokenizer(Protocol):
    """The tokenizer interface that an agent needs. transformers' fast tokenizers have it."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    all_special_tokens: list[str]
    all_special_ids: list[int]
    backend_tokenizer: Any

    def __call__(self, text: str, **how: Any) -> Mapping[str, Any]:
        """Token ids of a text, and each token's character offsets."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int] | AnyArray, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        """The spelling of each token in the vocabulary."""
        ...

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens given by their spelling."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Ids of all tokens, by spelling."""
        ...

    def get_added_vocab(self) -> dict[str, int]:
        """Ids of the tokens that were added to the trained vocabulary."""
        ...

    def get_chat_template(self) -> str:
        """The current chat template."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **how: Any) -> str:
        """Renders a conversation as text."""
        ...
