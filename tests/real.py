"""On real weights (`make test-real`): SmolLM2 as it is published, and Gemma 3 270M where it is installed, against transformers' own
reading of the same file."""

import copy
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxcomm.converters import load_agent, real, save, to_hf
from jaxcomm.converters.gguf import tokenizer

import gguf_files
from conftest import read, write

INSTALLED = [
    "smollm2",
    *(
        name
        for name in real.REAL
        if name != "smollm2" and all(real._installed(p, f) for p, _, f in real.REAL[name].parts)
    ),
]
"""The others are the user's choice (their licences are their own)."""
PAGE = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
"""Of the project's texts the one that does not change."""


class Both:
    """A real model twice: our agent, and transformers' model (float64) and tokenizer of the same file."""

    def __init__(self, name: str):
        self.name, self.file = name, real.find(f"real:{name}")
        self.agent = load_agent(f"real:{name}")
        where = dict(pretrained_model_name_or_path=self.file.parent, gguf_file=self.file.name)
        self.torch = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**where)


@pytest.fixture(scope="module", params=INSTALLED)
def both(request) -> Both:
    return Both(request.param)


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.double().numpy()


def test_weights_are_those_of_transformers_bit_for_bit(both):
    """Every one of its tensors is in ours, byte for byte."""
    ours = {leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(both.agent.params))}
    theirs = {key: value for key, value in both.torch.state_dict().items() if key != "lm_head.weight"}
    assert len(theirs) > 200 and both.agent.params.config.tied_head and both.agent.params.unrolled
    for key, value in theirs.items():
        assert value.numpy().tobytes() in ours, key


def distance(logits: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Root mean square, and the largest."""
    return np.sqrt(np.mean((logits - exact) ** 2)), np.abs(logits - exact).max()


def test_logits_of_600_tokens_are_near_float64_and_choose_the_same_tokens(both):
    """Of a licence, of lines in many scripts, and of tokens drawn at random."""
    drawn = np.random.default_rng(0).integers(both.agent.params.config.vocab, size=600)
    pages = {
        "licence": both.agent.encode(PAGE),
        "scripts": both.agent.encode(" ".join(gguf_files.texts())),
        "random": drawn,
    }
    exactly = torch.nn.Module.double(copy.deepcopy(both.torch))  # (its own .double() is for models of no file)
    for name, page in pages.items():
        tokens = np.array([page[:600]], np.int32)
        assert tokens.shape == (1, 600)
        got, theirs = np.asarray(read(both.agent.params, tokens), np.float64), logits(both.torch, tokens)
        exact = logits(exactly, tokens)
        (ours, worst), (other, worst_other) = distance(got, exact), distance(theirs, exact)
        print(
            f"{both.name}, {name}: logits from float64: RMS {ours:.2g}, largest {worst:.2g}; transformers in float32: "
            f"RMS {other:.2g}, largest {worst_other:.2g}; RMS {ours / other:.2f} times theirs"
        )
        # 0.9 to 1.8 times theirs were seen; the same code and text gave 1.45 on one machine and 1.75 on another.
        assert ours <= 2.5 * other and worst <= 4 * worst_other
        chosen = np.take_along_axis(exact, got.argmax(-1)[..., None], -1)[..., 0]
        assert (exact.max(-1) - chosen).max() <= 2 * worst, "another token, and not for a tie"
        assert np.mean(got.argmax(-1) == exact.argmax(-1)) > 0.995


def test_64_greedy_tokens(both):
    """Two prompts, left-padded together."""
    prompts = ["The capital of France is", "Once upon a time, there was a small house near the sea. In it"]
    read = both.agent.tokenize(prompts)
    out = write(both.agent.params, read, max_new_tokens=64)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([both.agent.encode(prompt)])
        want = both.torch.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        np.testing.assert_array_equal(out.tokens[row], want[0, ids.shape[1] :].numpy())


def test_tokens_of_many_scripts(both):
    """SmolLM2's oracle cuts digits apart, as its own tokenizer.json does, and as transformers' reading of its file does not."""
    want = both.tokenizer
    if both.name == "smollm2":
        from tokenizers import pre_tokenizers

        digits = pre_tokenizers.Digits(individual_digits=True)
        want.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    for text in gguf_files.texts(400):
        ids = both.agent.tokenizer.encode(text)
        assert ids == want.encode(text), text
        assert both.agent.tokenizer.decode(ids) == want.decode(ids), text


def test_chat_and_stop_tokens(both):
    if both.name != "smollm2":  # a base model
        assert both.tokenizer.chat_template is None and both.agent.stop_tokens == (1, 106)
        return
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    for conversation in (turns, turns[1:], [*turns, {"role": "assistant", "content": "Hi."}, turns[1]]):
        want = both.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        chatting = load_agent("real:smollm2", chat=True)
        assert chatting.render(conversation) == want
        assert chatting.encode(conversation) == both.tokenizer.encode(want, add_special_tokens=False)
    assert [both.agent.tokens([token])[0] for token in both.agent.stop_tokens] == ["<|im_end|>", "<|endoftext|>"]
    read = chatting.tokenize(["What is the capital of France? Answer in one word."])
    out = write(chatting.params, read, max_new_tokens=16, stop_tokens=chatting.stop_tokens)
    assert int(out.lengths[0]) < 16 and "Paris" in chatting.text(out)[0]


def test_converted_it_is_the_same_model_with_the_same_tokens(both, tmp_path):
    to_hf(both.agent.params, tmp_path / "hf", tokenizer=both.agent.tokenizer, stop_tokens=both.agent.stop_tokens)
    save(both.agent.params, tmp_path / "orbax", tokenizer=both.agent.tokenizer, stop_tokens=both.agent.stop_tokens)
    for folder in ("hf", "orbax"):
        again = load_agent(tmp_path / folder)
        assert again.stop_tokens == both.agent.stop_tokens
        for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(both.agent.params), strict=True):
            np.testing.assert_array_equal(x, y)
        for text in gguf_files.texts():
            assert again.tokenizer.encode(text) == both.agent.tokenizer.encode(text), text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.array([both.agent.encode(PAGE[:4000])[:64]], np.int32)
    np.testing.assert_array_equal(logits(theirs, tokens), logits(both.torch, tokens))
    assert tokenizer(both.file).encode("Alice") == both.agent.tokenizer.encode("Alice")
