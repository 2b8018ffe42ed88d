"""Trains the embedded pair from scratch: `jaxcomm train-pair a --out DIR`, `jaxcomm train-pair b --out DIR`.

Two Llama-architecture models of different width and depth with one tokenizer. Both are trained only on
`evals/pair/text.py`, never on passing activations. The result is an ordinary Hugging Face checkpoint in float16.

On CPU, a second core does not make a training step faster (ARCHITECTURE.md). So train both models at once, each on its own
core.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tokenizers
import tqdm
from jaxtyping import Array, Float, Int

from jaxcomm.config import ModelConfig, Rope
from jaxcomm.model import Params, init_params
from jaxcomm.prompts import Prompts
from jaxcomm.reading import forward

from ...converters import to_hf
from ..files import check_new
from .text import DOCUMENTS, Document, documents, plain

BOS, EOS = "<s>", "</s>"
SHAPES = {"a": dict(width=160, layers=7, heads=5, ff=432), "b": dict(width=128, layers=6, heads=4, ff=352)}
MIXTURE = ("companies", "places", "companies", "places", "echo")
"""Kinds of document, used in turn."""
COLUMNS = (20, 28, 48, 72, 112)
"""Lengths to pad documents to. All documents of a batch have the same length, so there is little padding."""
TOKENS = 1024
"""Number of tokens in a batch, including padding."""
CYCLES = {"a": (4500,), "b": (4500,)}
"""Number of steps of each learning-rate cycle. Every cycle starts from the weights rounded to float16, as they are saved."""
LEARNING_RATE = 4e-3
WARMUP = 200


def make_tokenizer(vocab: int = 4096, sample: int = 20_000) -> tokenizers.Tokenizer:
    """Learns a byte-level BPE tokenizer from the training text. Every text begins with BOS.

    Args:
        vocab: Largest size of the vocabulary.
        sample: Number of documents of each kind.

    Returns:
        The tokenizer.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Punctuation(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (plain(d) for kind in DOCUMENTS for d in itertools.islice(documents(kind, 0), sample))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def make_config(model: str, vocab: int) -> ModelConfig:
    """The architecture of a model of the pair.

    Args:
        model: "a" or "b".
        vocab: Size of the vocabulary.

    Returns:
        The architecture.
    """
    shape = SHAPES[model]
    return ModelConfig(
        vocab=vocab,
        width=shape["width"],
        layers=shape["layers"],
        heads=shape["heads"],
        kv_heads=shape["heads"],
        ff=shape["ff"],
        head_dim=32,
        max_positions=256,
        norm_eps=1e-5,
        rope=Rope(theta=10_000.0),
    )


def batches(tokenizer: tokenizers.Tokenizer, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draws documents of all kinds, and batches documents of similar length.

    Args:
        tokenizer: The tokenizer.
        seed: Seed of the documents.

    Yields:
        Tokens [B, T], padded with EOS on the right, and the weight of each token in the loss [B, T].
    """
    vocabulary = tokenizer.get_vocab()
    bos, eos = vocabulary[BOS], vocabulary[EOS]

    def encode(document: Document) -> tuple[list[int], list[float]]:
        pieces = tokenizer.encode_batch([text for text, _ in document], add_special_tokens=False)
        ids, weights = [bos], [0.0]
        for piece, (_, weight) in zip(pieces, document, strict=True):
            ids += piece.ids
            weights += [weight] * len(piece.ids)
        return [*ids, eos], [*weights, document[-1][1]]

    waiting = {columns: [] for columns in COLUMNS}
    for document in itertools.chain.from_iterable(
        zip(*(documents(kind, seed + i) for i, kind in enumerate(MIXTURE)), strict=True)
    ):
        ids, weight = encode(document)
        columns = next((c for c in COLUMNS if len(ids) <= c), None)
        if columns is None:
            continue
        waiting[columns].append((ids, weight))
        if len(waiting[columns]) < TOKENS // columns:
            continue
        tokens = np.full((TOKENS // columns, columns), eos, np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        for row, (ids, weight) in enumerate(waiting[columns]):
            tokens[row, : len(ids)], weights[row, : len(ids)] = ids, weight
        waiting[columns] = []
        yield tokens, weights


def loss(params: Params, tokens: Int[Array, "B T"], weights: Float[Array, "B T"]) -> Array:
    """Computes the weighted next-token cross-entropy.

    Args:
        params: The model.
        tokens: Tokens [B, T].
        weights: Weight of each token [B, T]. That of the first token is not used.

    Returns:
        The mean loss, in nats per unit of weight.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(forward(params, Prompts(tokens))[:, :-1], tokens[:, 1:])
    return jnp.sum(losses * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def make_optimizer(schedule) -> optax.GradientTransformation:
    """Makes the optimizer: Muon for the matrices of the blocks, Adam for embeddings and norms.

    Args:
        schedule: Learning rate by step.

    Returns:
        The optimizer.
    """

    def matrices(params: Any) -> Any:
        def kind(path, leaf):
            return None if "norm" in path[0].key else optax.contrib.MuonDimensionNumbers(-1, -2)

        layers = params.blocks if params.unrolled else (params.blocks,)
        kinds = tuple(jax.tree_util.tree_map_with_path(kind, layer) for layer in layers)
        nothing = jax.tree.map(lambda leaf: None, params.norm)
        return params.replace(embed=None, norm=nothing, blocks=kinds if params.unrolled else kinds[0])

    return optax.contrib.muon(
        schedule, weight_decay=0.05, adam_b2=0.98, consistent_rms=0.2, muon_weight_dimension_numbers=matrices
    )


def cycle(params: Params, tokenizer: tokenizers.Tokenizer, steps: int, seed: int, label: str) -> Params:
    """Trains for one cycle of the learning rate (warm-up and cosine decay) with a new optimizer.

    Args:
        params: The model to begin with.
        tokenizer: The tokenizer.
        steps: Number of steps.
        seed: Seed of the documents.
        label: Title of the progress bar.

    Returns:
        The trained model.

    Raises:
        FloatingPointError: The loss is not a finite number.
    """
    optimizer = make_optimizer(
        optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARMUP, steps // 2), steps, LEARNING_RATE / 50)
    )
    state = optimizer.init(params)  # pyright: ignore[reportArgumentType]

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, tokens, weights):
        value, gradient = jax.value_and_grad(loss)(params, tokens, weights)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    smooth, bar = None, tqdm.trange(steps, desc=label, mininterval=5)
    for n, (tokens, weights) in zip(bar, batches(tokenizer, seed), strict=False):
        params, state, value = step(params, state, tokens, weights)
        smooth = float(value) if smooth is None else 0.98 * smooth + 0.02 * float(value)
        if not np.isfinite(smooth):
            raise FloatingPointError(f"the loss is {smooth} at step {n}: nothing was written; try another seed")
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
    return params


def train(model: str, cycles: tuple[int, ...], seed: int) -> tuple[Params, tokenizers.Tokenizer]:
    """Trains a model of the pair from scratch.

    Args:
        model: "a" or "b".
        cycles: Number of steps of each cycle.
        seed: Seed of the weights and of the documents.

    Returns:
        The weights (stacked, float32, with values that float16 can represent), and the tokenizer.

    Raises:
        FloatingPointError: The loss is not a finite number.
    """
    tokenizer = make_tokenizer()
    params = init_params(jax.random.key(seed), make_config(model, tokenizer.get_vocab_size()))
    if jax.default_backend() == "cpu":
        params = params.unroll()
    for n, steps in enumerate(cycles):
        params = cycle(params, tokenizer, steps, seed + 1 + n, f"training {model}, cycle {n + 1} of {len(cycles)}")
        params = jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.float32), params)
    return params.stack(), tokenizer


def train_and_save(model: str, out: Path, *, steps: int | None = None, seed: int = 0) -> None:
    """Trains a model of the pair, and writes it as a Hugging Face checkpoint in float16.

    Args:
        model: "a" or "b".
        out: New folder for the checkpoint. It must not exist.
        steps: Number of steps. Default: as many as the shipped model was trained for.
        seed: Seed of the weights and of the documents.

    Raises:
        FileExistsError: `out` exists.
        FloatingPointError: The loss is not a finite number.
    """
    import transformers

    check_new(out)
    params, tokenizer = train(model, CYCLES[model] if steps is None else (steps,), seed)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    to_hf(params, out, tokenizer=wrapped, dtype=np.float16)
