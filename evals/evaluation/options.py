"""Options of an evaluation, for its command and for Python."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from .. import options
from ..games.wording import Reads

Protocol = Literal[
    "single",
    "sender",
    "skyline",
    "message",
    "debate",
    "cipher",
    "activation",
    "activation-w",
    "exchange",
    "kv",
    "latent",
    "thinking",
    "deltas",
    "bridge",
]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions(options.PrefixOptions):
    """How agents are evaluated. The agents and the tasks are given elsewhere."""

    protocols: tuple[Protocol, ...] = ("single",)
    """single: B alone; sender: A alone; skyline: B also reads what A reads (the same as single in tasks that give A nothing of its own); exchange: both directions at once; kv: A's keys and values before B's prompt; latent: the same, with those of A's latent thoughts; thinking: B alone thinks in latents; deltas: A's written message, with the changes of A's state; bridge: A's keys and values through a trained bridge."""
    controls: options.Controls = ("other",)
    k: tuple[int, ...] = ()
    """A's layer, or one for each sender."""
    j: int | None = None
    """B's layer."""
    k_back: int | None = None
    """exchange: B's layer that is sent, if not k."""
    j_back: int | None = None
    """exchange: A's layer after which it is grafted in, if not j."""
    graft: options.Graft = "replace"
    """How B's state b and A's state a are combined."""
    where: Literal["last", "all"] = "last"
    """Edit the prompt's last token, or all (graft sum; appendix B.1)."""
    think: int = 0
    """A first writes this many tokens; the state at the last one is sent (appendices B.2, B.5)."""
    judge_by: Literal["text", "likelihood"] = "text"
    """biographies: use the judge's written verdict (text), or its likeliest verdict (likelihood)."""
    rounds: int | None = None
    """Number of answers of each debater; default: 2 (debate), 3 (cipher)."""
    form: Literal["harness", "plain", "numeric", "choice", "biography"] = "harness"
    """Words around prompts in debates. harness: words that suit the harness' prompts; plain: none; the others: Du et al.'s words."""
    answer: Literal["numeric", "choice", "text"] | None = None
    """How votes are counted; default: numeric for gsm8k*, choice for mmlu*, else text."""
    tie: Literal["first", "last"] = "first"
    """Winner of a tied vote: B's answer (first), or the last debater's."""
    released_scoring: bool = False
    """Also score written numbers and letters as Du et al. describe, and as their released code does. (It drops minus signs,
    and counts answers that it cannot parse as right.)"""
    temperatures: tuple[float, ...] = ()
    """cipher: the temperatures of B, of A, and of each of the others."""
    stop: Literal["argmax", "nearest", "none"] = "argmax"
    """cipher: a response ends where the likeliest token (argmax) or the nearest token is a stop token; none: only at its full length."""
    partial: Literal["off", "entropy", "maxprob"] = "off"
    """cipher: use expected embeddings only where the model is uncertain."""
    ask: str = "{prompt}"
    """message: template of the prompt after which A writes."""
    tell: str = "{message}\n\n{prompt}"
    """message: template of what B reads."""
    max_message_tokens: int = 256
    """Largest number of tokens of a message."""
    max_new_tokens: int | None = None
    """Default: the task's."""
    temperature: float | None = None
    """Sample at this temperature, 0 is greedy; default: the task's own settings, mostly greedy."""
    top_p: options.TopP = 1.0
    n: int | None = None
    """Number of random questions of every task; default: all."""
    seed: int = 0
    """Seed of the questions, of the few-shot examples, and of sampling."""
    wording: options.Preset = "paper"
    """How games are worded, as in jaxcomm play."""
    instruction: str | None = None
    """Wording instructed: an instruction in place of the game's own."""
    sender_reads: Reads = "statement"
    """A's prompt before it sends, in tasks that give A a text: only this text, or the text and then B's question."""
    few_shot: int | None = None
    """Number of examples in the prompt; default: the task's."""
    names: Literal["seen", "new"] = "seen"
    """Our own tasks: names of people and companies, seen in the embedded pair's training text, or new."""
    batch_size: int = 16
    """Number of prompts that are read at once."""
    truncate: bool = False
    """Prompts that do not fit lose their first tokens, and are counted. Without this option they are refused."""
