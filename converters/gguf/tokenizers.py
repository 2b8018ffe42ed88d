"""Build the tokenizer that a .gguf file describes, with Hugging Face's `tokenizers`.

It follows llama.cpp's `llama-vocab.cpp`. The key `tokenizer.ggml.pre` names the pre-tokenizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .file import read

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens (tokenizer.ggml.token_type)."""

SPACE = "\u2581"
"""SentencePiece's character for a space."""

_INSTEAD = "load its tokenizer from a folder that has one (load_agent's and jaxcomm convert's `tokenizer`)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Pre(NamedTuple):
    """A pre-tokenizer: how to split texts into pieces before merging.

    Attributes:
        patterns: Regular expressions. Each one splits the pieces of the previous one.
        whole_words: Whether a piece that is a token stays whole, without merges.
        begins: Whether a text begins with the begin-of-text token, unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False


PRE: dict[str, Pre] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt", "exaone4", "gigachat", "trillion"), Pre((_GPT2,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), Pre((r"\p{N}", _GPT2))
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"), Pre((_LLAMA3,), True, True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Pre((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo", "f2llmv2"), Pre((_QWEN2,))),
    "tekken": Pre((_TEKKEN,), True, True),
    **dict.fromkeys(("gpt-4o", "kanana2"), Pre((_GPT4O,))),
}
"""tokenizer.ggml.pre -> the pre-tokenizer."""

ENDS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS]
    <|end_of_text|> <end_of_utterance>""".split()  # noqa: SIM905
)
"""Names of tokens that end a turn. Files from before 2025 name only one of several end tokens."""
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""transformers' names -> the file's, of `tokenizer.ggml.*_token_id`."""


class Vocabulary:
    """The tokenizer data in a file.

    Args:
        path: A .gguf file.

    Attributes:
        path: The file.
        template: The chat template. None: there is none.
        architecture: The value of general.architecture.
        longest: Largest number of tokens of a text. None: the file does not say.
        tokens: The tokens.
        kinds: The kind of each token (tokenizer.ggml.token_type).

    Raises:
        ValueError: The file has no tokenizer, or its lists have different lengths.
    """

    def __init__(self, path: Path):
        values = read(path).metadata
        self.path, self.template = path, values.get("tokenizer.chat_template")
        self.architecture = values.get("general.architecture")
        self.longest = values.get(f"{self.architecture}.context_length")
        self._values = {
            k.removeprefix("tokenizer.ggml."): v for k, v in values.items() if k.startswith("tokenizer.ggml.")
        }
        self.tokens: list[str] = self.get("tokens") or []
        self.kinds: list[int] = self.get("token_type") or [NORMAL] * len(self.tokens)
        if not self.tokens:
            raise ValueError(f"{path} has no tokenizer: {_INSTEAD}")
        for key in ("token_type", "scores"):
            if len(self.get(key) or self.tokens) != len(self.tokens):
                raise ValueError(
                    f"{path} has {len(self.tokens)} tokens and {len(self.get(key))} of tokenizer.ggml.{key}: convert it again"
                )

    def get(self, key: str, default: Any = None) -> Any:
        """The value of tokenizer.ggml.`key`, or the default if there is none."""
        return self._values.get(key, default)

    def number(self, name: str) -> int | None:
        """Finds the number of a special token.

        Args:
            name: Its name in the file, such as "bos" or "eos".

        Returns:
            The number. None: the file names no such token.

        Raises:
            ValueError: The number is not below the number of tokens.
        """
        number = self.get(f"{name}_token_id")
        if number is None or number in (-1, 2**32 - 1):
            return None
        if not 0 <= number < len(self.tokens):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{name}_token_id = {number}, but there are {len(self.tokens)} tokens"
            )
        return number

    def token(self, name: str) -> str | None:
        """Finds a special token.

        Args:
            name: Its name in the file, such as "bos" or "eos".

        Returns:
            The token. None: the file names no such token.

        Raises:
            ValueError: Its number is not below the number of tokens.
        """
        number = self.number(name)
        return None if number is None else self.tokens[number]


def tokenizer(path: Path) -> Any:
    """Builds the tokenizer that a file describes, with its chat template.

    Accents are read as they are written. Qwen's own tokenizer first composes them (NFC), but files do not say so.

    Args:
        path: A .gguf file.

    Returns:
        A transformers tokenizer.

    Raises:
        ValueError: The file has no tokenizer; its kind or its `tokenizer.ggml.pre` is not known; or it is damaged.
    """
    import transformers
    from tokenizers import AddedToken

    v = Vocabulary(path)
    if v.get("model") not in _KINDS:
        raise ValueError(
            f"{path}: tokenizer.ggml.model = {v.get('model')!r} is not supported, only {' and '.join(_KINDS)}: {_INSTEAD}"
        )
    try:
        spelled, made, begins = _KINDS[v.get("model")](v)
    except (TypeError, AttributeError) as error:  # e.g. numbers instead of texts
        raise ValueError(f"{path}: its tokenizer makes no sense ({error}): {_INSTEAD}") from error
    special = {theirs: token for theirs, name in _SPECIAL.items() if (token := v.token(name)) is not None}
    for kind, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        whole = [t for t, k, read in zip(v.tokens, v.kinds, spelled, strict=True) if k == kind and t and t == read]
        made.add_tokens([AddedToken(t, normalized=False, special=is_special or t in special.values()) for t in whole])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        add_bos_token=bool(v.get("add_bos_token", begins)),
        add_eos_token=bool(v.get("add_eos_token", False)),
        clean_up_tokenization_spaces=False,
        chat_template=v.template,
        **special,
        **({"model_max_length": v.longest} if v.longest else {}),
    )


def _numbered(v: Vocabulary, tokens: Sequence[str]) -> dict[str, int]:
    """Number the tokens. ValueError: a token occurs twice."""
    numbers = {token: i for i, token in enumerate(tokens)}
    if len(numbers) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if numbers[token] != i)
        raise ValueError(f"{v.path} has the token {twice!r} twice: {_INSTEAD}")
    return numbers


def _byte_level(v: Vocabulary) -> tuple[list[str], Any, bool]:
    """A byte-level tokenizer. Tokens are spelled with GPT-2's letters for bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pre = v.get("pre")
    if pre is None and v.architecture not in ("gpt2", "gptneox"):
        warnings.warn(
            f"{v.path} does not say how texts are cut (tokenizer.ggml.pre): they are cut as GPT-2's, tokens may differ",
            stacklevel=2,
        )
    cut = PRE.get(pre or "default")
    if cut is None:
        raise ValueError(f"{v.path}: tokenizer.ggml.pre = {pre!r} is not known here: {_INSTEAD}")
    merges = [tuple(merge.split(" ")) for merge in v.get("merges") or []]
    numbers = _numbered(v, v.tokens)
    if odd := next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= numbers.keys()), None):
        raise ValueError(f"{v.path} has the merge {' '.join(odd)!r}, which its tokens do not have: {_INSTEAD}")
    made = tokenizers.Tokenizer(models.BPE(vocab=numbers, merges=merges, ignore_merges=cut.whole_words))
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in cut.patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=bool(v.get("add_space_prefix", False)), use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    made.decoder = decoders.ByteLevel()
    return v.tokens, made, cut.begins


def _sentencepiece(v: Vocabulary) -> tuple[list[str], Any, bool]:
    """A SentencePiece tokenizer. Spaces are characters, and characters without a token are spelled byte by byte."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    gemma, prefix = str(v.architecture).startswith("gemma"), bool(v.get("add_space_prefix", True))
    # Gemma's tokens of several spaces are written with spaces; its merges are in the order of its tokens, not of their scores.
    tokens = [SPACE * len(t) if gemma and len(t) > 1 and not t.strip(" ") else t for t in v.tokens]
    scores = range(0, -len(tokens), -1) if gemma else v.get("scores")
    if scores is None:
        raise ValueError(f"{v.path} has no tokenizer.ggml.scores, which its tokens are joined by: {_INSTEAD}")
    numbers, unknown = _numbered(v, tokens), v.token("unknown")
    bpe = models.BPE(
        vocab=numbers, merges=_merges(numbers, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    made = tokenizers.Tokenizer(bpe)
    if gemma:
        made.normalizer, prefix = normalizers.Replace(" ", SPACE), False
    elif v.architecture == "phi3" and prefix:
        # As in its own tokenizer.json: put a space before every text, even if it begins with a space.
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first" if prefix else "never", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokens, made, True


def _merges(numbers: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All ways to merge two tokens into one. Merges of the best token come first; for one token, the longest left part."""
    found = []
    for token, number in numbers.items():
        score = scores[number]
        for at in range(len(token) - 1, 0, -1):
            left, right = token[:at], token[at:]
            if left in numbers and right in numbers:
                found.append((score, at, len(right), left, right))
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in found]


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
"""tokenizer.ggml.model -> its tokens as they are spelled, its tokenizer, and whether texts begin with a token of their
own."""


def stop_tokens(path: Path) -> tuple[int, ...]:
    """Finds the tokens that end a text or a turn.

    Args:
        path: A .gguf file.

    Returns:
        Their numbers: first those that the file names, then those whose names are known (`ENDS`).

    Raises:
        ValueError: The file has no tokenizer, or it is damaged.
    """
    v = Vocabulary(path)
    named = [v.number(name) for name in ("eos", "eot", "eom")]
    known = [i for i, token in enumerate(v.tokens) if token in ENDS and v.kinds[i] in (CONTROL, USER_DEFINED)]
    return tuple(dict.fromkeys(number for number in (*named, *known) if number is not None))
