"""Small random models twice, transformers' and ours, who say more than one word; and what transformers makes of them."""

import dataclasses

import pytest
import torch
import transformers

from jaxcomm.agent import Agent
from jaxcomm.converters import from_hf
from jaxcomm.evals.games import countries

import conftest
from conftest import make_checkpoint, toy_tokenizer

N = 6
"""Tokens or vectors in a message, and in an answer."""
BOS, EOS = 0, 1
WORDS = [*conftest.WORDS, "::"]
QUESTIONS = ["who is alice ?", "where is bob at the paris . who is ?", "alice says : bob is at rome ."]
OTHERS = ["where is rome ?", "who ?", "is bob at the rome ? paris ."]
TEXTS = [[" alice", " bob is at rome .", " the"], [" paris"], [" who is bob ? who is bob ?", " ."]]
GAMES = countries(0, 3)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """The same model twice, transformers' and ours, with its tokenizer."""

    torch: transformers.PreTrainedModel
    agent: Agent

    @property
    def chatty(self) -> "Speaker":
        return dataclasses.replace(self, agent=dataclasses.replace(self.agent, chat=True))

    @property
    def table(self) -> torch.Tensor:
        return self.torch.get_input_embeddings().weight.detach()


def speaker(where, family: str, seed: int, words=WORDS) -> Speaker:
    """Random, and lively: a fresh model says one word for ever, so blocks weigh more here, and logits differ more."""
    tokenizer = toy_tokenizer(words)
    changes = dict(final_logit_softcapping=15.0) if family == "gemma2" else {}
    model = make_checkpoint(
        where, family, seed, vocab_size=len(tokenizer), eos_token_id=EOS, num_hidden_layers=2, **changes
    ).torch
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(3)
            if family == "gemma2" and name.endswith(("attention_layernorm.weight", "feedforward_layernorm.weight")):
                weight.add_(2 if ".post_" in name else 0)
            if name == "model.norm.weight":
                weight.mul_(2).add_(2 if family == "gemma2" else 0)
        model.get_output_embeddings().weight[BOS] *= 0.05  # nobody says <s>, which text would lose
    model.save_pretrained(where)
    return Speaker(model, Agent(from_hf(where, unroll=False), tokenizer, (EOS,), name=family))


def ids(text: str, words=WORDS) -> list[int]:
    """The toy tokenizer: <s>, then a number per word."""
    return [BOS, *(2 + words.index(w) if w in words else BOS for w in text.split())]


def spell(tokens, words=WORDS) -> str:
    return " ".join(words[int(t) - 2] for t in tokens if t > EOS)


def greedy(model, tokens, steps):
    """transformers' own greedy text, its stop token included."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), do_sample=False, max_new_tokens=steps,
            eos_token_id=EOS, pad_token_id=EOS,
        )  # fmt: skip
    return out[0, len(tokens) :].tolist()


def log_likelihood(speaker: Speaker, before, after) -> tuple[float, bool]:
    with torch.no_grad():
        logits = speaker.torch(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1].double()
    picked = torch.log_softmax(logits, -1)[torch.arange(len(after)), torch.tensor(after)]
    return float(picked.sum()), logits.argmax(-1).tolist() == list(after)


def assert_scored(got, want, tokens) -> None:
    assert got.logprobs == pytest.approx([x for x, _ in want], abs=1e-4)
    assert got.greedy == tuple(g for _, g in want) and got.tokens == tuple(tokens)
