"""Writes .gguf files as llama.cpp's conversion does: the names from the package gguf, the changes of layout written down here
from its conversion scripts, independently of how `converters.gguf` undoes them."""

import gguf
import numpy as np
import torch

ARCHITECTURES = {
    "LlamaConfig": "llama", "MixtralConfig": "llama", "Qwen2Config": "qwen2", "Qwen3Config": "qwen3", "Qwen3MoeConfig": "qwen3moe",
    "Gemma2Config": "gemma2", "Gemma3TextConfig": "gemma3", "Phi3Config": "phi3", "Olmo2Config": "olmo2",
    "SmolLM3Config": "smollm3", "GPT2Config": "gpt2", "GPTNeoXConfig": "gptneox",
    "Olmo3Config": "olmo2", "GraniteConfig": "granite", "GraniteMoeConfig": "granitemoe", "GptOssConfig": "gpt-oss",
}  # fmt: skip
PAIRED = ("llama", "smollm3", "granite", "granitemoe")
BYTE, SENTENCEPIECE = "gpt2", "llama"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tensors(model, architecture: str) -> dict[str, np.ndarray]:
    """Of a transformers model, by their names in GGUF."""
    config = model.config
    layers = getattr(config, "num_hidden_layers", None) or config.n_layer
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, layers)
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    found = {}
    for key, tensor in model.state_dict().items():
        value = tensor.detach().to(torch.float32).numpy()
        if key.endswith((".attn.bias", "masked_bias", "inv_freq")):
            continue
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "gpt-oss" and (".experts." in key or key.endswith("sinks")):
            found |= gpt_oss(key, value)
            continue
        key = key.replace("block_sparse_moe.", "mlp.").replace("mlp.experts.down_proj", "mlp.experts.down_proj.weight")
        if "experts.gate_up_proj" in key:  # transformers keeps both together in memory
            layer = key.split(".")[2]
            gate, up = np.split(value, 2, axis=1)
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
            continue
        stem, _, part = key.rpartition(".")
        stem = (
            stem.replace("mlp.gate", "block_sparse_moe.gate")
            if architecture == "llama" and stem.endswith("mlp.gate")
            else stem
        )
        name = names.get_name(stem, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise KeyError(key)
        name = f"{name}.{part}"
        if architecture in PAIRED and (".attn_q." in name or ".attn_k." in name):
            value = permuted(value, heads if ".attn_q." in name else kv_heads)
        if architecture.startswith("gemma") and "norm" in name:
            value = value + np.float32(1)
        if (
            architecture == "gpt2"
            and part == "weight"
            and any(f".{x}." in name for x in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"))
        ):
            value = value.T
        if architecture == "gptneox" and ".attn_qkv." in name:
            value = np.concatenate(value.reshape(heads, 3, -1, *value.shape[1:]).swapaxes(0, 1), 0)
            value = value.reshape(-1, *value.shape[2:])
        found[name] = value
    return found


def gpt_oss(key: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Tensors of llama.cpp's GptOssModel: matrices are turned, and gate and up are taken apart."""
    layer, part = key.split(".")[2], "bias" if key.endswith("bias") else "weight"
    if key.endswith("sinks"):
        return {f"blk.{layer}.attn_sinks.weight": value}
    value = value.swapaxes(-1, -2) if part == "weight" else value
    if "down_proj" in key:
        return {f"blk.{layer}.ffn_down_exps.{part}": value}
    return {f"blk.{layer}.ffn_gate_exps.{part}": value[:, ::2], f"blk.{layer}.ffn_up_exps.{part}": value[:, 1::2]}


def metadata(writer: gguf.GGUFWriter, config, architecture: str) -> None:
    """What llama.cpp writes of a config, and rope factors as tensors."""
    if architecture == "gpt2":
        writer.add_block_count(config.n_layer)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_rope_dimension_count(int(config.rope_parameters.get("partial_rotary_factor", 1.0) * size))
        writer.add_parallel_residual(config.use_parallel_residual)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    rope = dict(config.rope_parameters)
    rope = dict(rope.get("full_attention", rope))
    writer.add_rope_freq_base(rope["rope_theta"])
    turning = int(rope.get("partial_rotary_factor", 1.0) * size)
    if architecture in ("llama", "phi3", "smollm3", "granite", "granitemoe"):
        writer.add_rope_dimension_count(turning)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
        low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        factors = []
        for length in 2 * np.pi / freqs.numpy():
            if length < old / high:
                factors.append(1.0)
            elif length > old / low:
                factors.append(rope["factor"])
            else:
                smooth = (old / length - low) / (high - low)
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        writer.add_rope_scaling_attn_factors(
            float(np.sqrt(1 + np.log(scale) / np.log(config.original_max_position_embeddings)))
        )
        for length in ("short", "long"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    if getattr(config, "num_experts_per_tok", None):
        writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if type(config).__name__ == "Olmo3Config":
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if architecture.startswith("granite"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if architecture in ("gemma2", "gemma3", "phi3", "gpt-oss"):
        writer.add_sliding_window(config.sliding_window or 0)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def write(
    path, model, *, vocabulary: dict | None = None, quantised: dict | None = None, change=lambda writer: None, **more
):
    """model: transformers'. vocabulary: of `byte_vocabulary` or `sentencepiece_vocabulary`. quantised: name of a tensor -> its bytes
    and type. change: is given the writer before it writes. more: GGUFWriter's."""
    architecture = ARCHITECTURES[type(model.config).__name__]
    writer = gguf.GGUFWriter(path, architecture, **more)
    metadata(writer, model.config, architecture)
    if vocabulary is not None:
        tokens(writer, vocabulary)
    quantised = quantised or {}
    for name, value in tensors(model, architecture).items():
        if name in quantised:
            data, kind = quantised[name]
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens(writer: gguf.GGUFWriter, v: dict) -> None:
    writer.add_tokenizer_model(v["model"])
    writer.add_token_list(v["tokens"])
    writer.add_token_types(v["kinds"])
    if "pre" in v:
        writer.add_tokenizer_pre(v["pre"])
    if "merges" in v:
        writer.add_token_merges(v["merges"])
    if "scores" in v:
        writer.add_token_scores(v["scores"])
    for name, number in v.get("special", {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, value in v.get("flags", {}).items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    if "template" in v:
        writer.add_chat_template(v["template"])


CORPUS = [
    "Alice is at the Louvre. Which country is Alice located in?\n\nShe's, we'll and they'VE: it isn't far; 12 345.67% (see x_1 = 3)",
    "Ünïcödé naïve Straße, ça va? Привет, мир! Как дела в 2024 году?", "こんにちは世界。東京タワーは333メートルです。",
    "你好，世界！我们在2023年去了巴黎。", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया १२", "안녕하세요 세계 여러분", "ΑΒΓ δεζ ǅ ﬁ ½ ² ⅷ",
    "def f(x):\n\treturn  x**2   # ok\r\n\r\n", "😀👩‍👩‍👧‍👦 emoji 🇩🇪", "e\u0301 combining a\u0308", "   leading and trailing   ", "a  b   c    d\n\n\n\ne",
]  # fmt: skip
MARKED = ["<|im_start|>", "<|im_end|>", "<think>"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def texts(n: int = 200, seed: int = 0) -> list[str]:
    """Of several scripts, with marked tokens among them."""
    rng = np.random.default_rng(seed)
    made = ["", *CORPUS, *MARKED]
    while len(made) < n:
        cuts = [rng.choice(CORPUS + MARKED) for _ in range(rng.integers(1, 7))]
        made.append("".join(str(t)[(i := int(rng.integers(0, 12))) : i + int(rng.integers(1, 14))] for t in cuts))
    return made


def byte_vocabulary(pre: str | None, cut, **flags) -> dict:
    """A byte-level BPE trained on CORPUS; cut: the pre-tokenizer it is trained with."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = cut
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=460, initial_alphabet=sorted(alphabet), show_progress=False)
    made.train_from_iterator(CORPUS * 2, trainer)
    import json

    model = json.loads(made.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    tokens = ["<|endoftext|>", *MARKED, *words]
    kinds = [3, 3, 3, 4] + [1] * len(words)
    special = {"bos": 0, "eos": 2, "unknown": 0, "padding": 0}
    pre = {} if pre is None else {"pre": pre}
    merges = [" ".join(merge) for merge in model["merges"]]
    return dict(
        model=BYTE, tokens=tokens, kinds=kinds, merges=merges, special=special, flags=flags, template=CHATML, **pre
    )


def sentencepiece_vocabulary(gemma: bool = False, **flags) -> dict:
    """Pieces with scores, and a token for every byte."""
    import json

    import tokenizers
    from tokenizers import models, trainers

    made = tokenizers.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False)
    made.train_from_iterator(["\u2581" + text.replace(" ", "\u2581") for text in CORPUS[:6]] * 2, trainer)
    vocab = json.loads(made.to_str())["model"]["vocab"]
    pieces = sorted(vocab, key=vocab.get)
    if gemma:
        pieces = [" " * len(piece) if len(piece) > 1 and not piece.strip("\u2581") else piece for piece in pieces]
    tokens = ["<unk>", "<s>", "</s>", *MARKED, *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    kinds = [2, 3, 3, 3, 3, 4] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * 262 + [-float(n) for n in range(len(pieces))]
    special = {"bos": 1, "eos": 2, "unknown": 0}
    return dict(
        model=SENTENCEPIECE, tokens=tokens, kinds=kinds, scores=scores, special=special, flags=flags, template=CHATML
    )
