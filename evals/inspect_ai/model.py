"""A pair of agents under a protocol as a model of Inspect AI.

Requests that arrive together are answered in one batch, in a separate thread.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import anyio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from jaxcomm.agent import Prompt
from jaxcomm.decoding import Sampling
from jaxcomm.protocols import PROTOCOLS, Reply

from .. import programs
from ..agents import load_agents
from .tasks import FOR

BATCH = 16
WAIT = 0.05
"""Seconds that a batch waits for further requests."""
DEFAULT_TOKENS = 256
REFUSED = (
    "best_of",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "top_logprobs",
    "prompt_logprobs",
    "response_schema",
    "reasoning_tokens",
    "modalities",
)
"""Unsupported generation settings that would change a result."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Options that all requests of a batch share.

    Attributes:
        max_tokens: Largest number of tokens of a reply.
        until: Stop strings.
        sampling: How to sample tokens. None: greedy.
    """

    max_tokens: int
    until: tuple[str, ...]
    sampling: Sampling | None


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for one reply.

    Attributes:
        prompts: The prompts of A and B.
        decoding: Options of decoding.
        seed: Random seed.
        reply: The future that receives the reply.
    """

    prompts: tuple[Prompt, Prompt]
    decoding: Decoding
    seed: int
    reply: Future[Reply]


class ProtocolAPI(ModelAPI):
    """The provider `jaxcomm/PROTOCOL`.

    A reads messages with the metadata {"agent": "a"}, B reads those with {"agent": "b"}, and both read all other messages.
    If no message is marked for A, A reads the same as B.

    Args:
        model_name: A key of `jaxcomm.protocols.PROTOCOLS`.
        base_url: Not used.
        api_key: Not used.
        config: Inspect's settings of generation.
        **model_args: a and b, as in `jaxcomm play`; chat (default: true if both have a chat template), chat_args, dtype,
            batch_size; all others are options of the protocol, such as k and j.

    Raises:
        ValueError: There is no such protocol, or a and b are missing.
        OSError: A checkpoint does not exist.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **model_args: Any,
    ):
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if model_name not in PROTOCOLS:
            raise ValueError(f"there is no protocol {model_name!r}: choose one of {', '.join(PROTOCOLS)}")
        if missing := [name for name in ("a", "b") if name not in model_args]:
            raise ValueError(f"jaxcomm/{model_name} needs {missing[0]}: name a checkpoint, -M {missing[0]}=...")
        if "control" in model_args:
            raise ValueError("controls need the right answers, which Inspect keeps from models: use jaxcomm play")
        names, own = (model_args.pop("a"), model_args.pop("b")), model_args
        chat, self.batch_size = own.pop("chat", None), int(own.pop("batch_size", BATCH))
        programs.keep()
        pair = load_agents(*names, dtype=own.pop("dtype", "auto"), chat_args=own.pop("chat_args", None), layers=True)
        chat = all(agent.tokenizer.chat_template for agent in pair) if chat is None else chat
        self.a, self.b = (dataclasses.replace(agent, chat=chat) for agent in pair)
        self.own: dict[str, Any] = own
        self.asked: Counter[str] = Counter()
        self.batches = Batches(self._answer, self.batch_size)

    def max_connections(self) -> int:
        """Number of requests that Inspect makes at once: the size of a batch."""
        return self.batch_size

    def connection_key(self) -> str:
        """Key of a pair of models. Pairs do not share connections."""
        return f"{self.model_name}/{self.a.name}/{self.b.name}"

    def max_tokens(self) -> int | None:
        """Default number of tokens of a reply."""
        return DEFAULT_TOKENS

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answers a conversation.

        Args:
            input: The messages.
            tools: Must be empty.
            tool_choice: Not used.
            config: Settings of generation. Greedy without a temperature.

        Returns:
            The reply, or `num_choices` replies; the log-probability of every token, if requested; the numbers of tokens
            that all agents read and wrote; and the protocol's details, with FLOPs and bytes, as metadata.

        Raises:
            ValueError: A tool or a setting is not supported, or a message is not text.
        """
        if tools:
            raise ValueError(f"jaxcomm/{self.model_name} calls no tools: leave out {tools[0].name}")
        if odd := [name for name in REFUSED if getattr(config, name)]:
            raise ValueError(f"jaxcomm/{self.model_name} does not follow {odd[0]}: leave it out")
        started, prompts = time.perf_counter(), self._prompts(input)
        decoding = Decoding(config.max_tokens or DEFAULT_TOKENS, tuple(config.stop_seqs or ()), sampling(config))
        requests = [self._request(prompts, decoding, config.seed or 0) for _ in range(config.num_choices or 1)]
        replies = [await self.batches.ask(request) for request in requests]
        choices = [self._choice(reply, decoding, bool(config.logprobs)) for reply in replies]
        read, written = (sum(getattr(reply.spent, name) for reply in replies) for name in ("read", "written"))
        usage = ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
        told = [{"flops": r.flops, "bytes_sent": r.spent.sent, **readable(r.details)} for r in replies]
        metadata: dict[str, Any] = told[0] if len(told) == 1 else {"choices": told}
        seconds = time.perf_counter() - started
        return ModelOutput(
            model=f"jaxcomm/{self.model_name}", choices=choices, usage=usage, time=seconds, metadata=metadata
        )

    def _prompts(self, messages: Sequence[ChatMessage]) -> tuple[Prompt, Prompt]:
        whose = lambda message: (message.metadata or {}).get(FOR)
        if odd := {whose(message) for message in messages} - {None, "a", "b"}:
            raise ValueError(
                f"a message is marked for {min(map(str, odd))!r}: mark it for a or b, or leave it unmarked"
            )
        marked = any(whose(message) == "a" for message in messages)
        read = lambda name: [message for message in messages if whose(message) in (None, name)]
        b = conversation(read("b"), self.b.chat)
        return (conversation(read("a"), self.a.chat) if marked else b), b

    def _request(self, prompts: tuple[Prompt, Prompt], decoding: Decoding, seed: int) -> Request:
        """Make a request. Its seed depends on the prompts and on how often they were asked, not on the order of requests."""
        key = f"{seed}/{prompts}/{decoding}"
        self.asked[key] += 1
        return Request(prompts, decoding, zlib.crc32(f"{key}/{self.asked[key]}".encode()), Future())

    def _answer(self, requests: Sequence[Request]) -> list[Reply]:
        """Answer requests with the same options. Pads their number to a power of two, so that few programs are compiled."""
        size = 1 << (len(requests) - 1).bit_length()
        rows, decoding = [*requests, *[requests[-1]] * (size - len(requests))], requests[0].decoding
        how: dict[str, Any] = dict(sampling=decoding.sampling, seed=[row.seed for row in rows])
        prompts = [[row.prompts[n] for row in rows] for n in (0, 1)]
        turn = PROTOCOLS[self.model_name](self.a, self.b, *prompts, **how, **self.own)
        return turn.write(decoding.max_tokens, until=decoding.until, **how)[: len(requests)]

    def _choice(self, reply: Reply, decoding: Decoding, logprobs: bool) -> ChatCompletionChoice:
        message = ChatMessageAssistant(content=reply.text, model=f"jaxcomm/{self.model_name}", source="generate")
        told = None
        if logprobs:
            pairs = zip(reply.written, reply.logprobs, strict=True)
            told = Logprobs(content=[Logprob(token=token, logprob=value) for token, value in pairs])
        full = len(reply.written) >= decoding.max_tokens
        return ChatCompletionChoice(message=message, stop_reason="max_tokens" if full else "stop", logprobs=told)


class Batches:
    """Collects requests that arrive together, and answers them in batches.

    Args:
        answer: Function that answers requests with the same options.
        size: Largest number of requests in a batch.
    """

    def __init__(self, answer: Callable[[Sequence[Request]], list[Reply]], size: int):
        self.answer, self.size = answer, size
        self.waiting: queue.Queue[Request] = queue.Queue()
        threading.Thread(target=self._work, name="jaxcomm", daemon=True).start()

    async def ask(self, request: Request) -> Reply:
        """Waits for a reply.

        Args:
            request: The request.

        Returns:
            The reply.

        Raises:
            ValueError: A prompt is too long, or an option of the protocol is invalid.
        """
        self.waiting.put(request)
        return await anyio.to_thread.run_sync(request.reply.result, abandon_on_cancel=True)

    def _work(self) -> None:
        while True:
            batch = [self.waiting.get()]
            until = time.monotonic() + WAIT
            while len(batch) < self.size:
                try:
                    batch.append(self.waiting.get(timeout=max(0.0, until - time.monotonic())))
                except queue.Empty:
                    break
            groups: dict[Decoding, list[Request]] = {}
            for request in batch:
                groups.setdefault(request.decoding, []).append(request)
            for requests in groups.values():
                self._reply(requests)

    def _reply(self, requests: Sequence[Request]) -> None:
        """Sets the replies or, after an error, raises it in the callers. The thread continues."""
        try:
            for request, reply in zip(requests, self.answer(requests), strict=True):
                request.reply.set_result(reply)
        except Exception as error:
            for request in requests:
                request.reply.set_exception(error)


def sampling(config: GenerateConfig) -> Sampling | None:
    """Reads the options of sampling.

    Args:
        config: Inspect's settings of generation.

    Returns:
        The sampling. None: there is no temperature, or 0, so decoding is greedy.
    """
    if not config.temperature:
        return None
    return Sampling(config.temperature, config.top_k or 0, 1.0 if config.top_p is None else config.top_p)


def conversation(messages: Sequence[ChatMessage], chat: bool) -> Prompt:
    """Makes a prompt from Inspect's messages.

    Args:
        messages: The messages, all text.
        chat: Whether the agent reads it through a chat template. Otherwise a question and its answer are one paragraph.

    Returns:
        The turns.

    Raises:
        ValueError: There is no message, or one is not text or is from a tool.
    """
    if not messages:
        raise ValueError("there is no message for one of the agents: leave some unmarked, or mark some for each")
    turns: list[dict[str, str]] = []
    for message in messages:
        if message.role == "tool" or not (isinstance(message.content, str) or message.text):
            raise ValueError(f"jaxcomm reads text only, not a {message.role}'s message of another kind")
        if not chat and message.role == "assistant" and turns:
            turns[-1]["content"] += f" {message.text}"
        else:
            turns.append({"role": message.role, "content": message.text})
    return turns


def readable(details: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps only values that can be written as JSON: numbers, texts and lists of them."""
    plain = lambda x: isinstance(x, str | int | float | bool | None)
    whole = lambda x: plain(x) or (isinstance(x, list | tuple) and all(map(plain, x)))
    return {name: list(x) if isinstance(x, tuple) else x for name, x in details.items() if whole(x)}
