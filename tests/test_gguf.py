"""GGUF files: weights, architecture and tokenizer of every architecture, against the checkpoint a file was made from and against
transformers' own reading of the file; quantised types; damaged files."""

import math
import re
import shutil
import struct

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from gguf import quants
from tokenizers import Regex, pre_tokenizers

from jaxcomm.converters import from_hf, load_agent, save, to_hf
from jaxcomm.converters.agents import architecture, stored_dtype
from jaxcomm.converters.gguf import stop_tokens, tokenizer
from jaxcomm.decoding import generate
from jaxcomm.sharding import local_mesh, shard

import gguf_files
from command import refused
from conftest import make_checkpoint, prompts, read

DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = DEFAULT | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "llama": {},
    "llama_untied_bias": {},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": dict(use_sliding_window=False, sliding_window=None),
    "gemma2": dict(query_pre_attn_scalar=16),
    "gemma3_text": dict(
        query_pre_attn_scalar=16, num_hidden_layers=7, layer_types=None,
        rope_parameters={
            "sliding_attention": DEFAULT, "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    ),
    "phi3": {},
    "olmo2": {},
    "olmo3": dict(rope_parameters={
        "sliding_attention": DEFAULT,
        "full_attention": YARN | {"attention_factor": 0.1 * math.log(4.0) + 1.0},
    }),
    "granite": {},
    "granitemoe": {},
    "gpt_oss": dict(swiglu_limit=7.0),
    "smollm3": dict(no_rope_layers=None, use_sliding_window=False, sliding_window=None, layer_types=None),
    "gpt2": {},
    "gpt_neox": {},
    "gpt_neox_serial": {},
}  # fmt: skip
"""What GGUF can say of the checkpoints of `conftest.CONFIGS`."""


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_checkpoint_it_was_made_from(name, tmp_path):
    """Every weight bit for bit, and the same architecture, so the same numbers. (Gemma's norms lie there as w + 1.)"""
    pair = make_checkpoint(tmp_path / "checkpoint", name, seed=3, **CASES[name])
    got = from_hf(gguf_files.write(tmp_path / "model.gguf", pair.torch), unroll=False)
    assert got.config == pair.params.config
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(pair.params), strict=True
    ):
        rounded = (
            (theirs + np.float32(1)) - np.float32(1)
            if "gemma" in name and "norm" in jax.tree_util.keystr(path)
            else theirs
        )
        np.testing.assert_array_equal(ours, rounded, err_msg=jax.tree_util.keystr(path))


SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
READ_BY_TRANSFORMERS = {
    "llama": dict(**SIZES, rope_parameters=DEFAULT),
    "qwen2": dict(hidden_size=64, intermediate_size=96),
    "qwen3": dict(**SIZES | {"head_dim": 128}, rope_parameters=DEFAULT),  # it takes every head to have so many
    "qwen3_moe": dict(
        **SIZES, moe_intermediate_size=768, use_sliding_window=False, sliding_window=None, rope_parameters=DEFAULT
    ),
    "gemma2": dict(**SIZES, query_pre_attn_scalar=16),
    "gemma3_text": CASES["gemma3_text"] | dict(
        **SIZES, query_pre_attn_scalar=16, rope_parameters={"sliding_attention": DEFAULT, "full_attention": DEFAULT}
    ),
    "phi3": dict(hidden_size=64, intermediate_size=96, rope_parameters=DEFAULT, original_max_position_embeddings=4096),
    "gpt2": dict(n_embd=64),
}  # fmt: skip


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model_out_of_a_quantised_file(name, tmp_path):
    """Oracle: its dequantised model of the same file, saved and read by `from_hf`."""
    pair = make_checkpoint(tmp_path / "checkpoint", name, seed=5, **READ_BY_TRANSFORMERS[name])
    kind = gguf.GGMLQuantizationType.Q8_0
    weights = gguf_files.tensors(pair.torch, gguf_files.ARCHITECTURES[type(pair.torch.config).__name__])
    large = {
        key: (quants.quantize(np.ascontiguousarray(value), kind), kind)
        for key, value in weights.items()
        if value.ndim > 1 and value.shape[-1] % 32 == 0
    }
    assert len(large) >= 4 * 4
    # It asks the tokenizer for what the model's default config would say.
    few = dict(
        model="gpt2", tokens=[f"t{i}" for i in range(97)], kinds=[1] * 97, merges=["t 1"], special={"padding": 0}
    )
    path = gguf_files.write(tmp_path / "model.gguf", pair.torch, quantised=large, vocabulary=few)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    pair.torch.load_state_dict(theirs.state_dict())
    pair.torch.save_pretrained(tmp_path / "theirs")  # (the quantised model does not save itself)
    want, got = from_hf(tmp_path / "theirs"), from_hf(path)
    for (at, ours), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, other, err_msg=jax.tree_util.keystr(at))
    assert got.config == want.config
    assert any(
        not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(pair.params), strict=True)
    )


@pytest.mark.parametrize(
    ("size", "factor", "high", "original"), [(128, 8.0, 4.0, 8192), (64, 32.0, 4.0, 8192), (96, 16.0, 3.0, 5000)]
)
def test_llama3s_numbers_are_found_in_the_divisors_a_file_has(size, factor, high, original, tmp_path):
    """Of published models, and of one that nobody has published."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
    }
    rope |= {"original_max_position_embeddings": original}
    pair = make_checkpoint(
        tmp_path / "checkpoint", "llama", 3, head_dim=size, num_hidden_layers=1, rope_parameters=rope
    )
    assert from_hf(gguf_files.write(tmp_path / "model.gguf", pair.torch)).config == pair.params.config


QUANTISED = sorted(kind.name for kind in quants._type_traits if kind.name != "BF16")


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """Rows of 256, as many as every quantised type needs."""
    changes = dict(
        hidden_size=256,
        intermediate_size=256,
        head_dim=64,
        num_hidden_layers=len(QUANTISED) // 7 + 1,
        rope_parameters=DEFAULT,
    )
    return make_checkpoint(tmp_path_factory.mktemp("wide_llama"), "llama", seed=6, **changes)


def test_every_quantised_type_the_package_reads_is_read(wide_llama, tmp_path):
    """A tensor of each type, of random blocks, in one file; every piece is what the package makes of the whole tensor."""
    rng, chosen = np.random.default_rng(0), {}
    names = [
        key
        for key, value in gguf_files.tensors(wide_llama.torch, "llama").items()
        if value.ndim == 2 and key.startswith("blk")
    ]
    for name, type_name in zip(names, QUANTISED, strict=False):
        kind = gguf.GGMLQuantizationType[type_name]
        columns, size = gguf.GGML_QUANT_SIZES[kind]
        rows = gguf_files.tensors(wide_llama.torch, "llama")[name].shape[0]
        blocks = rng.integers(0, 0x3C, (rows, 256 // columns * size), np.uint8)  # no scale of them is infinite
        chosen[name] = blocks, kind
    assert len(chosen) == len(QUANTISED) > 20
    got = from_hf(gguf_files.write(tmp_path / "model.gguf", wide_llama.torch, quantised=chosen), unroll=True)
    where = {"attn_q": ("attention", "q"), "attn_k": ("attention", "k"), "attn_v": ("attention", "v"), "attn_output": ("attention", "o"),
             "ffn_gate": ("mlp", "gate"), "ffn_up": ("mlp", "up"), "ffn_down": ("mlp", "down")}  # fmt: skip
    for name, (blocks, kind) in chosen.items():
        _, layer, part, _ = name.split(".")
        want = quants.dequantize(blocks, kind)
        if part in ("attn_q", "attn_k"):
            want = want.reshape(-1, 32, 2, 256).swapaxes(1, 2).reshape(want.shape)
        group, leaf = where[part]
        assert np.isfinite(want).all() and np.ptp(want) > 0, kind
        np.testing.assert_array_equal(got.blocks[int(layer)][group][leaf]["weight"], want, err_msg=kind.name)


def test_a_file_is_read_onto_a_mesh_and_in_pieces(wide_llama, tmp_path, monkeypatch):
    kind = gguf.GGMLQuantizationType.Q4_1
    weights = gguf_files.tensors(wide_llama.torch, "llama")
    large = {key: (quants.quantize(value, kind), kind) for key, value in weights.items() if value.ndim > 1}
    path = gguf_files.write(tmp_path / "model.gguf", wide_llama.torch, quantised=large)
    whole, mesh = from_hf(path), local_mesh(tensor=2)
    monkeypatch.setattr("jaxcomm.converters.tensors.PIECE", 3000)
    for got, want in ((from_hf(path), whole), (from_hf(path, mesh=mesh), shard(whole, mesh))):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
            np.testing.assert_array_equal(x, y)


def test_a_model_in_several_files_and_the_dtype_of_its_weights(llama, tmp_path):
    whole = gguf_files.write(tmp_path / "whole.gguf", llama.torch)
    gguf_files.write(tmp_path / "part.gguf", llama.torch, split_max_tensors=11)
    parts = sorted(tmp_path.glob("part-0*.gguf"))
    assert len(parts) > 2
    for path in (parts[0], parts[1]):
        for x, y in zip(jax.tree.leaves(from_hf(path)), jax.tree.leaves(from_hf(whole)), strict=True):
            np.testing.assert_array_equal(x, y)
    assert stored_dtype(whole) == np.float32 and architecture(whole) == llama.params.config
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00002-of-\d+\.gguf is missing"):
        from_hf(parts[0])


def levels(*before):
    return pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before or before == (DIGITS,))]
    )


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


DIGITS = pre_tokenizers.Digits(individual_digits=True)
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
BYTE_LEVEL = {
    "gpt-2": levels(), "default": levels(), "llama-bpe": levels(split(LLAMA3)), "qwen2": levels(split(QWEN2)),
    "dbrx": levels(split(LLAMA3)), "smollm": levels(DIGITS), "tekken": levels(split(LLAMA3)), "gpt-4o": levels(split(LLAMA3)),
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Makes a file of a vocabulary: a model as large as that."""

    def made(vocabulary, name="llama", **changes):
        folder = tmp_path_factory.mktemp("words")
        changes = dict(num_hidden_layers=1, vocab_size=len(vocabulary["tokens"])) | changes
        pair = make_checkpoint(folder / "checkpoint", name, seed=8, **changes)
        return gguf_files.write(folder / "model.gguf", pair.torch, vocabulary=vocabulary)

    return made


def theirs(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def assert_same_tokens(got, want, texts):
    for text in texts:
        ids = got.encode(text)
        assert ids == want.encode(text), text
        assert got.decode(ids) == want.decode(ids), text


CONVERSATION = [{"role": "user", "content": "Where is Alice?"}]


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_tokens_are_those_of_transformers(pre, words):
    """Which cuts texts as every `pre` says, but smollm's, where it leaves digits together: there the oracle is the pre-tokenizer of
    the model's own tokenizer.json."""
    path = words(
        gguf_files.byte_vocabulary(pre, BYTE_LEVEL[pre], **({"add_bos_token": True} if pre == "qwen2" else {}))
    )
    got, want = tokenizer(path), theirs(path)
    if pre == "smollm":
        want.backend_tokenizer.pre_tokenizer = BYTE_LEVEL[pre]
    if pre in ("llama-bpe", "tekken"):  # transformers does not know that such texts begin with a token, llama.cpp does
        want.add_bos_token = True
    assert_same_tokens(got, want, gguf_files.texts())
    how = dict(tokenize=False, add_generation_prompt=True)
    assert got.apply_chat_template(CONVERSATION, **how) == want.apply_chat_template(CONVERSATION, **how)
    assert stop_tokens(path) == (2, 0)  # <|im_end|> is named, <|endoftext|> known


def test_a_file_that_does_not_say_how_texts_are_cut_is_read_with_a_warning(words):
    path = words(gguf_files.byte_vocabulary(None, BYTE_LEVEL["gpt-2"]))
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre"):
        got = tokenizer(path)
    assert_same_tokens(got, theirs(path), gguf_files.texts(50))
    tokenizer(words(gguf_files.byte_vocabulary(None, BYTE_LEVEL["gpt-2"]), "gpt2"))  # GPT-2's own: nothing to warn of


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "phi3"])
def test_sentencepiece_tokens_are_those_of_transformers(name, words):
    path = words(
        gguf_files.sentencepiece_vocabulary(name.startswith("gemma")), name, **CASES[name] | {"num_hidden_layers": 1}
    )
    assert_same_tokens(tokenizer(path), theirs(path), gguf_files.texts())


def test_no_space_is_put_before_texts_where_the_file_says_so(words):
    vocabulary = gguf_files.sentencepiece_vocabulary(add_space_prefix=False, add_bos_token=False)
    plain, spaced = tokenizer(words(vocabulary)), tokenizer(words(vocabulary | {"flags": {"add_bos_token": False}}))
    assert plain.encode(" Alice") == spaced.encode("Alice") != plain.encode("Alice")
    assert plain.decode(plain.encode("Alice")) == "Alice"


@pytest.fixture(scope="module")
def chatting(words):
    return words(gguf_files.byte_vocabulary("qwen2", BYTE_LEVEL["qwen2"]), "qwen2", tie_word_embeddings=True)


def test_an_agent_out_of_a_file_answers_and_is_converted_with_its_tokenizer(chatting, tmp_path):
    """Both kinds of folder say, token for token, what the file says; weights are theirs bit for bit."""
    agent = load_agent(chatting, chat=True, name="agent")
    to_hf(agent.params, tmp_path / "hf", tokenizer=agent.tokenizer, stop_tokens=agent.stop_tokens)
    save(agent.params, tmp_path / "orbax", tokenizer=agent.tokenizer, stop_tokens=agent.stop_tokens)
    asked = agent.tokenize(["Where is Alice?", "12 345"])
    said = generate(agent.params, asked, max_new_tokens=8, stop_tokens=agent.stop_tokens)
    for folder in ("hf", "orbax"):
        again = load_agent(tmp_path / folder, chat=True, name="agent")
        assert again.stop_tokens == agent.stop_tokens and again.params.config == agent.params.config
        for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(agent.params), strict=True):
            np.testing.assert_array_equal(x, y)
        for text in gguf_files.texts():
            assert again.encode(text) == agent.encode(text), text
        prompts = again.tokenize(["Where is Alice?", "12 345"])
        np.testing.assert_array_equal(prompts.tokens, asked.tokens)
        out = generate(again.params, prompts, max_new_tokens=8, stop_tokens=again.stop_tokens)
        np.testing.assert_array_equal(out.tokens, said.tokens)


def test_logits_of_a_file_are_those_of_transformers(chatting):
    """Beyond the weights: 700 tokens, as transformers' model of the file computes them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        chatting.parent, gguf_file=chatting.name, dtype=torch.float64
    )
    tokens = prompts(1, 700)
    with torch.no_grad():
        want = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(read(from_hf(chatting, unroll=False), tokens), want, rtol=0, atol=2e-5)


def rewrite(path, out, change):
    data = bytearray(path.read_bytes())
    change(data)
    out.write_bytes(data)
    return out


def at(offset, new):
    def change(data):
        data[offset : offset + len(new)] = new

    return change


def kind_of_first_tensor(data):
    """Of token_embd.weight: its name, two axes, then its type."""
    begin = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    data[begin : begin + 4] = struct.pack("<I", 77)


def cut_after(share):
    def change(data):
        del data[int(len(data) * share) :]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_after(0.9), r"cut short: it has \d+ bytes, tensor \S+ ends at \d+: download it again"),
        (cut_after(0.05), "truncated or corrupt"),
        (cut_after(0), "is empty"),
        (at(0, b"GGML"), "is not a GGUF file"),
        (at(4, struct.pack("<I", 1)), "is of GGUF version 1, only 2 and 3"),
        (at(4, struct.pack(">I", 3)), "big-endian"),
        (kind_of_first_tensor, r"token_embd\.weight is of an unknown type \(77\)"),
        (at(16, struct.pack("<Q", 2**60)), "truncated or corrupt"),
    ],
)
def test_a_damaged_file_is_one_line(change, message, chatting, tmp_path):
    path = rewrite(chatting, tmp_path / "model.gguf", change)
    for reader in (from_hf, load_agent):
        with pytest.raises(ValueError, match=message) as error:
            reader(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("share", np.linspace(0, 1, 23, endpoint=False))
def test_a_file_cut_anywhere_is_refused(share, chatting, tmp_path):
    path = rewrite(chatting, tmp_path / "model.gguf", cut_after(share))
    with pytest.raises(ValueError, match=r"empty|truncated|cut short|not a GGUF"):
        load_agent(path)


def test_what_is_not_known_is_refused_by_name(llama, tmp_path):
    def made(change, **vocabulary):
        path = tmp_path / "model.gguf"
        return gguf_files.write(path, llama.torch, change=change, **vocabulary)

    def refuses(message, change, reader=from_hf, **vocabulary):
        path = made(change, **vocabulary)
        with pytest.raises(ValueError, match=message) as error:
            reader(path)
        assert "\n" not in str(error.value)

    refuses("unknown keys llama.attention.surprise = 3", lambda w: w.add_uint32("llama.attention.surprise", 3))
    refuses("llama.attention.sliding_window = 5 is not supported", lambda w: w.add_sliding_window(5))
    refuses(
        "no place for: blk.0.surprise.weight", lambda w: w.add_tensor("blk.0.surprise.weight", np.ones(3, np.float32))
    )
    other = gguf_files.sentencepiece_vocabulary()
    nothing = lambda w: None
    refuses(
        r"tokenizer\.ggml\.model = 'bert' is not supported", nothing, load_agent, vocabulary=other | {"model": "bert"}
    )
    refuses("has no tokenizer", nothing, load_agent)
    unknown = gguf_files.byte_vocabulary("klingon", BYTE_LEVEL["gpt-2"])
    refuses(r"tokenizer\.ggml\.pre = 'klingon' is not known", nothing, load_agent, vocabulary=unknown)
    short = other | {"kinds": other["kinds"][:-1]}
    refuses("kinds of tokens|tokenizer.ggml.token_type", nothing, load_agent, vocabulary=short)
    twice = other | {"tokens": [*other["tokens"][:-1], other["tokens"][-2]]}
    refuses("twice", nothing, load_agent, vocabulary=twice)
    outside = other | {"special": {"eos": 10**6}}
    refuses(r"eos_token_id = 1000000, but there are", nothing, load_agent, vocabulary=outside)
    for mamba in (tmp_path / "mamba.gguf",):
        writer = gguf.GGUFWriter(mamba, "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match=r"architecture 'mamba' is not supported; supported are llama, qwen2"):
            from_hf(mamba)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.add_string("llama.rope.dimension_count", "many"),
        lambda w: w.add_array("llama.rope.freq_base", ["a", "a"]),
        lambda w: w.add_string("llama.rope.scaling.type", "none of them"),
        lambda w: w.add_array("llama.attention.sliding_window", [1, 2, 3]),
        lambda w: w.add_string("llama.rope.scaling.type", "yarn"),  # beside llama3's divisors
    ],
)
def test_metadata_of_the_wrong_kind_are_one_line(change, llama, tmp_path):
    """Whatever they are: the file is named, and nothing else is raised."""

    class Later:
        """The writer, which takes each key once: what it has of these goes first."""

        def __init__(self, writer):
            self.writer = writer

        def __getattr__(self, name):
            def write(key, value):
                self.writer.kv_data[0].pop(key, None)
                getattr(self.writer, name)(key, value)

            return write

    path = gguf_files.write(tmp_path / "model.gguf", llama.torch, change=lambda w: change(Later(w)))
    with pytest.raises(ValueError, match=r"model\.gguf") as error:
        from_hf(path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_the_wrong_kinds_is_one_line(llama, tmp_path):
    vocabulary = gguf_files.byte_vocabulary("gpt-2", BYTE_LEVEL["gpt-2"])
    odd = lambda w: (w.kv_data[0].pop("tokenizer.ggml.merges"), w.add_array("tokenizer.ggml.merges", [1, 2, 3]))
    path = gguf_files.write(tmp_path / "model.gguf", llama.torch, vocabulary=vocabulary, change=odd)
    with pytest.raises(ValueError, match=r"model\.gguf: its tokenizer makes no sense"):
        tokenizer(path)


def test_another_tokenizer_may_be_named(llama, chatting, tmp_path):
    bare = gguf_files.write(tmp_path / "bare.gguf", llama.torch)
    tokenizer(chatting).save_pretrained(tmp_path / "words")
    agent = load_agent(bare, tokenizer=tmp_path / "words")
    assert agent.tokenizer.encode("Alice") == tokenizer(chatting).encode("Alice") and agent.stop_tokens == (2,)


def test_a_folder_of_files_says_to_name_one(chatting, tmp_path, capsys):
    shutil.copy(chatting, tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match=re.escape(f"name one of its files, such as {tmp_path / 'model.gguf'}")):
        from_hf(tmp_path)
    assert "name one of its files" in refused(capsys, "play", "--a", tmp_path, "--b", "pair:b", "--k", 1, "--j", 1)
