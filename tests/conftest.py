"""What every test runs under: eight CPU devices, strict dtype promotion, no network, jaxtyping annotations checked.

Tiny random checkpoints of every family, their norms and biases perturbed (a fresh initialisation of ones and zeros
hides bugs), are made once a session by transformers itself.
"""

import os
from importlib.metadata import version

# Most of the time is compiling: LLVM does less here and kernels come from XLA's older emitters, which changes no program, only
# the code made of it, in two fifths of the time. (The demo, the benchmarks and some commands that tests run in processes of
# their own have it as users have it.)
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if version("jaxlib").startswith("0.10."):  # later ones have no others, and do not know the flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
if QUICK not in os.environ.get("XLA_FLAGS", ""):  # a worker of pytest-xdist has them already
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import dataclasses
import gc
from pathlib import Path

import flax.struct
import jax
import jax.monitoring
import jaxtyping
import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
settings.register_profile("jaxcomm", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("jaxcomm")
ROOT = Path(__file__).parents[1]
PACKAGES = {"jaxcomm": "jaxcomm", "converters": "jaxcomm.converters", "evals": "jaxcomm.evals"}
ANNOTATED = [
    ".".join([name, *path.relative_to(ROOT / room).with_suffix("").parts]).removesuffix(".__init__")
    for room, name in PACKAGES.items()
    for path in (ROOT / room).rglob("*.py")
    if "jaxtyping" in path.read_text(encoding="utf-8")
]
"""Modules with shapes in their annotations. (Checked everywhere, the calls that make a million sentences take minutes.)"""
flax.struct.PyTreeNode.__no_type_check__ = True  # its transformations put other things in the place of a tree's arrays
install_import_hook(ANNOTATED, "beartype.beartype")

import tokenizers
import torch
import transformers

from jaxcomm.agent import Agent
from jaxcomm.communication import communicate
from jaxcomm.converters import from_hf, load_agent
from jaxcomm.decoding import generate
from jaxcomm.evals import programs
from jaxcomm.evals.pair import folder
from jaxcomm.model import Params
from jaxcomm.reading import forward

programs.keep()
# Tracing makes millions of objects that stay; looking through them again and again is a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

SMALL = dict(
    vocab_size=97, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024
)
CONFIGS = {
    "llama": (transformers.LlamaConfig, dict(
        hidden_size=48, intermediate_size=80, head_dim=16, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    )),
    "llama_untied_bias": (transformers.LlamaConfig, dict(
        hidden_size=32, intermediate_size=64, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    )),
    "qwen2": (transformers.Qwen2Config, dict(
        hidden_size=32, intermediate_size=64, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )),
    "qwen2_windows": (transformers.Qwen2Config, dict(
        hidden_size=32, intermediate_size=64, use_sliding_window=True, sliding_window=7, max_window_layers=2,
    )),
    "gemma2": (transformers.Gemma2Config, dict(
        hidden_size=40, intermediate_size=64, head_dim=16, query_pre_attn_scalar=24, sliding_window=9,
        attn_logit_softcapping=3.0, final_logit_softcapping=2.0,
    )),
    "mistral": (transformers.MistralConfig, dict(hidden_size=32, intermediate_size=64, sliding_window=8)),
    "mixtral": (transformers.MixtralConfig, dict(
        hidden_size=32, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2, head_dim=12,
    )),
    "qwen3": (transformers.Qwen3Config, dict(
        hidden_size=32, intermediate_size=64, head_dim=12, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        },
    )),
    "qwen3_moe": (transformers.Qwen3MoeConfig, dict(
        hidden_size=32, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3, head_dim=12,
        use_sliding_window=True, sliding_window=11, norm_topk_prob=True,
    )),
    "gemma3_text": (transformers.Gemma3TextConfig, dict(
        hidden_size=40, intermediate_size=64, head_dim=16, query_pre_attn_scalar=24, sliding_window=9,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
        },
    )),
    "gemma4_text": (transformers.Gemma4TextConfig, dict(
        hidden_size=40, intermediate_size=64, head_dim=16, global_head_dim=32, num_key_value_heads=4,
        num_global_key_value_heads=2, attention_k_eq_v=True, sliding_window=9, final_logit_softcapping=2.0, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        },
    )),
    "gemma4_experts": (transformers.Gemma4TextConfig, dict(
        hidden_size=40, intermediate_size=56, head_dim=16, global_head_dim=24, sliding_window=9, attention_bias=True,
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=6, top_k_experts=3, moe_intermediate_size=24,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {
                "rope_type": "proportional", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25, "factor": 2.0,
            },
        },
    )),
    "qwen3_5_text": (transformers.Qwen3_5TextConfig, dict(
        hidden_size=40, intermediate_size=64, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=12, linear_value_head_dim=8, linear_conv_kernel_dim=3,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )),
    "phi3": (transformers.Phi3Config, dict(
        hidden_size=32, intermediate_size=64, tie_word_embeddings=True, max_position_embeddings=4096,
        original_max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.5], "long_factor": [1.0, 2.0, 9.0],
        },
    )),
    "olmo2": (transformers.Olmo2Config, dict(hidden_size=32, intermediate_size=64)),
    "olmo3": (transformers.Olmo3Config, dict(
        hidden_size=32, intermediate_size=64, sliding_window=9, rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    )),
    "granite": (transformers.GraniteConfig, dict(
        hidden_size=32, intermediate_size=64, attention_multiplier=0.2, embedding_multiplier=3.1, residual_multiplier=0.4,
        logits_scaling=1.7, tie_word_embeddings=True,
    )),
    "granitemoe": (transformers.GraniteMoeConfig, dict(
        hidden_size=32, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2, attention_multiplier=0.2,
        embedding_multiplier=3.1, residual_multiplier=0.4, logits_scaling=1.7,
    )),
    "gpt_oss": (transformers.GptOssConfig, dict(
        hidden_size=32, intermediate_size=24, head_dim=12, num_local_experts=5, num_experts_per_tok=2, sliding_window=9,
        swiglu_limit=0.6, rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "truncate": False,
        },
    )),
    "smollm3": (transformers.SmolLM3Config, dict(
        hidden_size=32, intermediate_size=64, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=10,
    )),
    "gpt2": (transformers.GPT2Config, dict(n_embd=32, n_layer=4, n_head=4, n_positions=1024)),
    "gpt_neox": (transformers.GPTNeoXConfig, dict(
        hidden_size=48, intermediate_size=64, rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )),
    "gpt_neox_serial": (transformers.GPTNeoXConfig, dict(
        hidden_size=32, intermediate_size=64, use_parallel_residual=False, attention_bias=False,
    )),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights twice: transformers' model (float32, eager) and ours, and the folder both came from."""

    name: str
    torch: transformers.PreTrainedModel
    params: Params
    folder: Path


def make_checkpoint(folder: Path, name: str, seed: int, **changes) -> Pair:
    kind, values = CONFIGS[name]
    ends = ("pad_token_id", "bos_token_id", "eos_token_id")
    no_token = {key: None for key in ends if (getattr(kind, key) or 0) >= SMALL["vocab_size"]}
    common = {key: value for key, value in SMALL.items() if key in kind.__annotations__ or key == "vocab_size"}
    config = kind(**{**common, **no_token, **values, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None):
        model.set_experts_implementation("eager")  # the default knows no float64
    with torch.no_grad():
        for key, weight in model.named_parameters():
            wide = "norm" in key or key.endswith(("bias", "sinks", "scale"))
            weight.add_(torch.randn_like(weight) * (0.3 if wide else 0.1))
            if name in ("olmo2", "olmo3", "gemma3_text", "gemma4_text", "gemma4_experts") and "post" in key:
                # Or the stream is ten times as large as in the other families, and so is all rounding, transformers' too.
                weight.sub_(0.75)
            if name.startswith("gemma4") and "q_norm" in key:
                # Or scores, which nothing divides, are as large as a head, and rounding decides between two keys.
                weight.sub_(0.7)
        for key, number in model.named_buffers():
            if key.endswith("layer_scalar"):
                number.add_(torch.randn_like(number) * 0.3)
    model.save_pretrained(folder)
    return Pair(name, model, from_hf(folder, unroll=False), folder)


WORDS = ["who", "is", "where", "alice", "bob", "rome", "paris", "the", "at", ".", "?", "user", "assistant", ":", "says"]
TEMPLATE = "<s> {% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"


def toy_tokenizer(words=WORDS) -> transformers.PreTrainedTokenizerFast:
    """One token per word, after the specials <s> (begins every raw prompt, and is what unknown words become) and </s>."""
    vocabulary = {w: i for i, w in enumerate(["<s>", "</s>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


QUICK_FILES = {
    "test_answers", "test_figures", "test_hub", "test_mapping", "test_package", "test_published", "test_reading", "test_report",
}  # fmt: skip
"""Of `make check`: the files whose tests take least, together a third of all tests."""


LONG_FILES = [
    "test_sweeps",
    "test_evaluate",
    "test_lmnet_training",
    "test_pair",
    "test_processes",
    "test_lmnet_commands",
]
"""Few tests that take long: they begin first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    order = {name: n for n, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.stem in QUICK_FILES:
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def room_for_programs():
    """Every compiled program on CPU holds some hundred memory maps. A process may have 65530: without this the compiler
    dies of them in the middle of the tests."""
    yield
    programs.release()


@pytest.fixture(scope="session", params=list(CONFIGS))
def pair(request, tmp_path_factory) -> Pair:
    """One of every family and variant."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=1)


KINDS = ("llama", "gemma2", "gemma3_text", "gemma4_text", "qwen3_5_text", "mixtral", "gpt_oss", "gpt2", "gpt_neox")
"""Between them: every kind of norm placement, position, mask and MLP that a block knows, linear attention, and layers of
unlike shapes."""


@pytest.fixture(scope="session", params=KINDS)
def kind(request, tmp_path_factory) -> Pair:
    """One of every kind of block, for what is not about families."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=1)


@pytest.fixture(scope="session", params=[name for name in KINDS if name != "qwen3_5_text"])
def attending(request, tmp_path_factory) -> Pair:
    """One of every kind with attention in all layers, for what linear attention does not have."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Pair:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", seed=2)


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Pair:
    """A receiver wider and deeper than `llama`."""
    return make_checkpoint(tmp_path_factory.mktemp("wide"), "qwen2", seed=3, hidden_size=64, num_hidden_layers=5)


@pytest.fixture(scope="session")
def trio(tmp_path_factory):
    """Speakers of three families, three widths, one vocabulary; "reversed" has another tokenizer."""
    from speakers import WORDS, speaker

    make = lambda name, *how: speaker(tmp_path_factory.mktemp(name), *how)
    return {
        "llama": make("llama", "llama", 23),
        "qwen2": make("qwen2", "qwen2", 22),
        "gemma2": make("gemma2", "gemma2", 32),
        "reversed": make("reversed", "qwen2", 27, [*WORDS[::-1], "extra"]),
    }


@pytest.fixture(scope="session")
def trained():
    """A model of the embedded pair: real text, a byte-level tokenizer."""
    from speakers import Speaker

    model = transformers.AutoModelForCausalLM.from_pretrained(folder("b"), dtype=torch.float32)
    return Speaker(model.eval(), load_agent(folder("b"), name="b", unroll=False))


@pytest.fixture(scope="session")
def b() -> Agent:
    """B of the embedded pair."""
    return load_agent(folder("b"), name="b", unroll=False)


@pytest.fixture(scope="module")
def one_thread():
    """A second thread makes torch thirty times slower on models this small, where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


write, talk, read = generate, communicate, forward


@contextlib.contextmanager
def compiles():
    """A list that grows by one with every program XLA is given to compile, or finds among those of earlier runs."""
    seen, counting = [], True

    def listen(event: str, seconds: float, **_) -> None:
        if counting and event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    counting = False


def prompts(rows: int, columns: int, seed: int = 0, vocab: int = 97) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, columns)).astype(np.int32)


ROUNDED = 2e-5
"""How far the float32 of a whole model may be from float64.

Its own rounding, more or less with the processor's order of sums: transformers' own float32 is up to 1.1e-5 away in the
same prompts (Gemma 2, the last layer). One layer given the same stream is held to half of it.
"""


def assert_close(got, want, what: str, tolerance: float = 1e-5) -> None:
    """Fails with the worst index, the RMS error and the share of violations."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape} instead of {want.shape}"
    error = np.abs(got - want) / np.maximum(1.0, np.abs(want))
    if not error.size:  # such as the keys of linear attention
        return
    worst = np.unravel_index(np.argmax(error), error.shape)
    assert error[worst] <= tolerance, (
        f"{what}: {got[worst]:.7g} instead of {want[worst]:.7g} at {tuple(map(int, worst))}; RMS error "
        f"{np.sqrt(np.mean((got - want) ** 2)):.2e}, {np.mean(error > tolerance):.2%} beyond {tolerance:g}"
    )


@pytest.fixture
def unchecked():
    """As users have it: shapes in annotations are not looked at."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refused(call, says):
    """A call that is refused in one clear line."""
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value) and "\n" not in str(error.value)
