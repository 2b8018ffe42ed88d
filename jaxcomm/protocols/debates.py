"""Debate in text (Du et al. 2023): all agents answer, read what the others said, and answer again.

Rounds are synchronous: in every round an agent sees the others' answers of the previous round. The forms keep the
structure and key phrases of the authors' prompts (their Figure 15 and scripts), in our words.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.decoding import Sampling
from jaxcomm.messages import Message
from jaxcomm.protocols.answers import ANSWERS, Parse, Tie, vote
from jaxcomm.protocols.base import Reply, Scored, Spent, Turn, Writing, start_turn, total
from jaxcomm.protocols.controls import Control, Link, StandIn, as_stand_in, worst_of_others
from jaxcomm.protocols.text import check_words, likelihoods, put, text
from jaxcomm.seeds import Seed, derive_seed


@dataclasses.dataclass(frozen=True)
class Form:
    """The words of a debate, as templates.

    Their places are {prompt}, {answer} (one agent's answer) and {others} (all the other agents' answers).

    Attributes:
        peer: Template for another agent's answer, with {answer}.
        update: Template for the later rounds, with {prompt} and {others}.
        start: Template for the first round, with {prompt}.
        own: Template for the agent's own answer, with {answer}. "" leaves it out.
        last: Template for the final round, if it differs from `update`.
        alone: Template for an agent without peers, if it differs from `update`.
        turns: Whether an agent's answers stay in the conversation, with the update as its next turn (Du et al. 2023).
            Otherwise the agent reads only the update.

    Raises:
        ValueError: A template has other places than these.

    Example:
        >>> form = protocols.Form(peer="{answer} ", update="{others}{prompt}")
        >>> form.next_prompt("Where is Bob?", "Where is Bob?", own="In Rome.", peers=["In Petra."], last=False)
        'In Petra. Where is Bob?'
    """

    peer: str
    update: str
    start: str = "{prompt}"
    own: str = ""
    last: str | None = None
    alone: str | None = None
    turns: bool = False

    def __post_init__(self):
        check_words("start", self.start, {"prompt"}, {"prompt"})
        for name in ("peer", "own", "update", "last", "alone"):
            check_words(
                name, getattr(self, name) or "", (), {"answer"} if name in ("peer", "own") else {"prompt", "others"}
            )

    def begin(self, prompt: Prompt) -> Prompt:
        """Makes an agent's first prompt.

        Args:
            prompt: The question.

        Returns:
            The first prompt.
        """
        return put(self.start, prompt)

    def next_prompt(self, prompt: Prompt, heard: Prompt, own: str, peers: Sequence[str], last: bool) -> Prompt:
        """Makes an agent's next prompt.

        Args:
            prompt: The question.
            heard: The agent's previous prompt.
            own: Its answer in this round.
            peers: The others' answers in this round.
            last: Whether the next round is the final one.

        Returns:
            The next prompt.
        """
        others = "".join(self.peer.format(answer=p) for p in peers) + self.own.format(answer=own)
        words = (self.last if last and self.last else self.update) if peers else (self.alone or self.update)
        asked = put(words, prompt, others=others)
        if not self.turns:
            return asked
        before = [{"role": "user", "content": heard}] if isinstance(heard, str) else list(heard)
        content = asked if isinstance(asked, str) else asked[-1]["content"]
        return [*before, {"role": "assistant", "content": own}, {"role": "user", "content": content}]


_SOLUTIONS = "These are the solutions to the problem from other agents:\n\n{others}"
_SOLUTION = "One agent solution: ```{answer}```\n\n"
_BOXED = (
    "Give your final answer as a single numerical number, in the form \\boxed{{answer}}, at the end of your response."
)
_LETTER = "Put the answer in the form (X) at the end of your response."

FORMS = {
    "harness": Form(
        peer=_SOLUTION,
        own="Your own solution: ```{answer}```\n\n",
        update=_SOLUTIONS + "Use these solutions as additional information and answer again.\n\n{prompt}",
    ),
    "plain": Form(peer="{answer} ", update="{others}{prompt}"),
    "numeric": Form(
        start=f"Can you solve the following math problem? {{prompt}} Explain your reasoning. {_BOXED}",
        peer=_SOLUTION,
        update=f"{_SOLUTIONS}Using the solutions from other agents as additional information, can you give your answer to the math problem? The original math problem is: {{prompt}} {_BOXED}",
        alone=f"Can you double check that your answer is correct? Please restate it. {_BOXED}",
        turns=True,
    ),
    "choice": Form(
        start=f"Can you answer the following question as accurately as possible? {{prompt}} Explain your answer. {_LETTER}",
        peer=_SOLUTION,
        update=f"{_SOLUTIONS}Using the reasoning from other agents as additional advice, can you give an updated answer? Examine your solution and that of the other agents step by step. {_LETTER}",
        alone=f"Can you double check that your answer is correct? {_LETTER}",
        turns=True,
    ),
    "biography": Form(
        start="Give a bullet point biography of {prompt}, highlighting their contributions and achievements as a computer scientist, with each fact separated with a new line character.",
        peer="Agent response: ```{answer}```\n\n",
        update="Here are some bullet point biographies of {prompt} given by other agents:\n\n{others}Using these responses as additional advice, what is your updated bullet point biography of the computer scientist {prompt}?",
        last="Here are some bullet point biographies of {prompt} given by other agents:\n\n{others}Closely examine your biography and those of the other agents and give an updated bullet point biography.",
        alone="Closely examine your biography and give an updated bullet point biography.",
        turns=True,
    ),
}
"""harness: for a prompt that ends in its own cue ("Answer:"), as in lm-evaluation-harness. plain: the answers, then the
prompt. numeric, choice, biography: Du et al.'s."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """The turns of several agents that all answer the same prompts.

    Attributes:
        turns: The turn of each agent.
        parse: Function that finds the answer in a text, for the vote.
        tie: Which agent wins a tied vote: the "first" or the "last".
        before: Cost of each prompt so far.
        details: The texts of earlier rounds, for each prompt.
        receiver: Index of B's turn. B is the agent that receives messages. Default: the last.

    Example:
        >>> asked = ["Bob is at Petra. Which country is Bob located in?"]
        >>> panel = protocols.debate((agent, agent), (asked, asked), rounds=1)
        >>> panel.write(4)[0].details["answers"]
        ['jordan', 'jordan']
    """

    turns: Sequence[Turn]
    parse: Parse
    tie: Tie
    before: Sequence[Spent]
    details: Sequence[dict[str, Any]]
    receiver: int = -1

    def rendered(self, i: int) -> list[str]:
        """Renders each agent's prompt for one answer, as the text that its tokenizer got.

        Args:
            i: Number of the prompt.

        Returns:
            One text for each agent.
        """
        return [turn.rendered(i)[0] for turn in self.turns]

    def write(
        self,
        max_new_tokens: int = 16,
        *,
        until: Sequence[str] = (),
        sampling: Sampling | Sequence[Sampling | None] | None = None,
        seed: Seed = 0,
    ) -> list[Reply]:
        """Lets all agents reply, and returns the majority's reply (`answers.vote`).

        Args:
            max_new_tokens: Largest number of tokens of a reply.
            until: Stop strings. They are not in the text.
            sampling: How to sample tokens, for all agents or one for each. None: greedy decoding.
            seed: Seed of all prompts, or one for each.

        Returns:
            One reply for each prompt. Its cost is the total of all agents' replies. Its details hold every agent's text
            and answer, and the number of the agent whose reply was chosen.

        Raises:
            ValueError: As for `Turn.write`.
            FloatingPointError: As for `Turn.write`.
        """
        drawn = per_agent(sampling, len(self.turns))
        said = [
            turn.write(max_new_tokens, until=until, sampling=s, seed=derive_seed(seed, i))
            for i, (turn, s) in enumerate(zip(self.turns, drawn, strict=True))
        ]
        return [self._elect(i, list(replies)) for i, replies in enumerate(zip(*said, strict=True))]

    def _elect(self, i: int, replies: list[Reply]) -> Reply:
        answers = [self.parse(r.text) for r in replies]
        winner = vote(answers, self.tie)
        details = {"agent": winner, "answers": answers, "texts": [r.text for r in replies]}
        spent = self.before[i] + total(r.spent for r in replies)
        return dataclasses.replace(
            replies[winner], spent=spent, details={**self.details[i], **replies[winner].details, **details}
        )

    def score(self, continuations: Sequence[Sequence[str]]) -> list[Scored]:
        """Scores the texts that are given after each prompt.

        Args:
            continuations: Texts after each prompt. Their number may differ from prompt to prompt.

        Returns:
            Log-probabilities after each prompt: the mean over the agents. A text is `greedy` if more than half of the
            agents would generate it. Numbers of tokens are the first agent's.

        Raises:
            ValueError: As for `Turn.score`.
        """
        scored = zip(*(turn.score(continuations) for turn in self.turns), strict=True)
        return [self._join(i, every) for i, every in enumerate(scored)]

    def _join(self, i: int, every: Sequence[Scored]) -> Scored:
        n = len(every)
        logprobs = tuple(sum(own) / n for own in zip(*(x.logprobs for x in every), strict=True))
        greedy = tuple(2 * sum(own) > n for own in zip(*(x.greedy for x in every), strict=True))
        spent, details = self.before[i] + total(x.spent for x in every), {**self.details[i], **every[0].details}
        return dataclasses.replace(every[0], logprobs=logprobs, greedy=greedy, spent=spent, details=details)


@dataclasses.dataclass(frozen=True)
class Debate(Writing):
    """Options of `debate`.

    Attributes:
        max_message_tokens: Largest number of tokens of an answer before the last round.
        until: Strings that end such an answer.
        sampling: How to sample such answers, for all agents or one for each. None: greedy decoding.
        seed: Random seed for all questions, or one for each.
        rounds: How often every agent answers. The `Panel` writes the last answers.
        form: The wording, or a name in `FORMS`.
        answer: How to parse a text for the vote: a function, or a name in `ANSWERS`.
        tie: Which agent wins a tied vote: the "first" or the "last".
        control: Stand-in that every agent gets instead of each of the others' answers: a name in `CONTROLS`, or a
            `StandIn`. None: the answers. An agent always sees its own answers unchanged.

    Raises:
        ValueError: `rounds` is below 1; there is no such form, answer or control.
    """

    rounds: int = 2
    form: Form | str = "harness"
    answer: Parse | str = "text"
    tie: Tie = "first"
    control: Control | StandIn | None = None

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds}: a debate has at least 1, the first answers")
        object.__setattr__(self, "form", lookup(self.form, FORMS, "form"))
        object.__setattr__(self, "answer", lookup(self.answer, ANSWERS, "answer"))
        object.__setattr__(self, "control", as_stand_in(self.control))


def debate(agents: Sequence[Agent], prompts: Sequence[Sequence[Prompt]], **how: Any) -> Panel:
    """Agents answer, read what the others said, and answer again (Du et al. 2023).

    There may be any number of agents. They may have different tokenizers.

    Args:
        agents: The agents that take part.
        prompts: For each agent, one prompt for every question.
        **how: Options of `Debate`: rounds, form, answer, tie, control, max_message_tokens, until, sampling and seed.

    Returns:
        All agents' turns. `Reply.details` holds all texts of the earlier rounds.

    Raises:
        ValueError: There is no agent; an agent does not have one prompt for every question; an option is invalid.

    Example:
        >>> asked = ["Bob is at Petra. Which country is Bob located in?"]
        >>> panel = protocols.debate((agent, agent), (asked, asked), form="plain", max_message_tokens=8)
        >>> panel.write(4)[0].details["rounds"]
        [['Jordan', 'Jordan']]
    """
    settings = Debate(**how)
    words: Any = settings.form
    check_debate(agents, prompts)
    heard = [[words.begin(p) for p in own] for own in prompts]
    turns = [start_turn(agent, own) for agent, own in zip(agents, heard, strict=True)]
    n, items = len(agents), range(len(prompts[0]))
    spent, said = [Spent() for _ in items], [[] for _ in items]
    for r in range(1, settings.rounds):
        replies = [settings.write(turn, r * n + i, i) for i, turn in enumerate(turns)]
        texts = [[reply.text for reply in own] for own in replies]
        for i in items:
            spent[i] += total(own[i].spent for own in replies)
            spent[i] += Spent(sent=(n - 1) * sum(len(own[i].encode()) for own in texts))
            said[i].append([own[i] for own in texts])
        step = functools.partial(next_prompts, words, prompts, heard, last=r == settings.rounds - 1)
        received = [texts] * n
        if settings.control is not None:
            received = [_received(settings, agents, prompts, texts, step, b) for b in range(n)]
        heard = step(received)
        turns = [
            dataclasses.replace(start_turn(agent, heard[b]), received=_peers(received[b], b))
            for b, agent in enumerate(agents)
        ]
    parse: Any = settings.answer
    return Panel(turns, parse, settings.tie, spent, [{"rounds": texts} for texts in said])


def _peers(received: Sequence[Sequence[str]], b: int) -> Message:
    """All texts that agent b received from the others, as one message."""
    others = [own for a, own in enumerate(received) if a != b]
    return Message(text=tuple("\n".join(own[i] for own in others) for i in range(len(received[b]))))


def _received(
    settings: Debate,
    agents: Sequence[Agent],
    prompts: Sequence[Sequence[Prompt]],
    texts: Sequence[Sequence[str]],
    step: Callable[[Sequence[Any]], list[list[Prompt]]],
    b: int,
) -> list[Sequence[str]]:
    """The texts that agent b receives from every agent, after the control: for each agent, one text per question."""
    assert isinstance(settings.control, StandIn)
    words: Any = settings.form
    received = list(texts)

    def likely(a: int, message: Message, answers: Sequence[str]) -> np.ndarray:
        changed = [*received[:a], message.text, *received[a + 1 :]]
        return likelihoods(start_turn(agents[b], step([changed] * len(agents))[b]), answers)

    def unrelated(a: int, sentence: str) -> Message:
        turn = start_turn(agents[a], [words.begin(sentence)] * len(texts[b]))
        return Message(text=tuple(reply.text for reply in settings.write(turn, 0, a)))

    for a, agent in enumerate(agents):
        if a != b:
            worst = lambda m, answers, a=a: worst_of_others(m, answers, lambda x: likely(a, x, answers), settings.seed)
            link = Link(
                agent,
                generated=lambda: Message(text=tuple(texts[b])),
                unrelated=functools.partial(unrelated, a),
                own=lambda: Message(text=tuple(text(prompt) for prompt in prompts[b])),
                worst=worst,
            )
            received[a] = settings.control(Message(text=tuple(texts[a])), link, settings.seed).text or ()
    return received


def next_prompts(
    form: Form,
    prompts: Sequence[Sequence[Prompt]],
    heard: Sequence[Sequence[Prompt]],
    texts: Sequence[Sequence[Sequence[str]]],
    *,
    last: bool,
) -> list[list[Prompt]]:
    """Makes each agent's next prompts, question by question.

    Args:
        form: The wording.
        prompts: For each agent, its questions.
        heard: For each agent, its previous prompts.
        texts: For each agent, the answers that it receives from every agent (itself included) to each question.
        last: Whether the next round is the final one.

    Returns:
        For each agent, its next prompts.
    """

    def peers(agent: int, i: int) -> list[str]:
        return [own[i] for other, own in enumerate(texts[agent]) if other != agent]

    return [
        [form.next_prompt(prompt, heard[a][i], texts[a][a][i], peers(a, i), last) for i, prompt in enumerate(own)]
        for a, own in enumerate(prompts)
    ]


def check_debate(agents: Sequence[Agent], prompts: Sequence[Sequence[Prompt]]) -> None:
    """Checks that every agent has one prompt for each question.

    Args:
        agents: The agents that take part.
        prompts: For each agent, its prompts.

    Raises:
        ValueError: There is no agent, or an agent has another number of prompts.
    """
    if not agents or len(agents) != len(prompts) or len({len(own) for own in prompts}) > 1:
        raise ValueError(
            f"{len(agents)} agents and prompts for {[len(own) for own in prompts]}: give every agent one for each question"
        )


def lookup(value: Any, table: dict[str, Any], what: str) -> Any:
    """Looks up an object by its name.

    Args:
        value: The object itself, or its name.
        table: Objects by name.
        what: Word for the object in an error.

    Returns:
        The object.

    Raises:
        ValueError: No object has this name.
    """
    if isinstance(value, str) and value not in table:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(table)}")
    return table[value] if isinstance(value, str) else value


def per_agent(value: Any, agents: int) -> Sequence[Any]:
    """Returns one value for each agent.

    Args:
        value: One value, or a list or tuple with one for each agent.
        agents: Number of agents.

    Returns:
        One value for each agent.
    """
    return value if isinstance(value, list | tuple) else [value] * agents
