"""Trains the embedded pair from scratch: `python -m jaxcomm.evals.pair.train --model a`.

Two Llama-architecture models of different width and depth, one tokenizer, both trained on `evals/pair/text.py` alone
and never on handing activations over. The result is an ordinary Hugging Face checkpoint, float16.

On CPU one model needs one core: a second one does not make the step faster (ARCHITECTURE.md), so train both at once,
each on its own core.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tqdm
from jaxtyping import Array, Float, Int

from jaxcomm.config import ModelConfig, Rope
from jaxcomm.evals.pair.text import DOCUMENTS, Document, documents, plain
from jaxcomm.model import Params, forward, init

BOS, EOS = "<s>", "</s>"
SHAPES = {"a": dict(width=128, layers=6, heads=4, ff=352), "b": dict(width=160, layers=8, heads=5, ff=432)}
MIXTURE = ("companies", "places", "companies")
COLUMNS = (20, 28, 48, 72, 112)
"""Lengths that documents are padded to; a batch holds documents of one of them, so little of it is padding."""
import os
TOKENS = int(os.environ.get("TOK","2048"))
"""Tokens in a batch, padding included."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains one model of the embedded pair and writes it as a Hugging Face checkpoint."""

    model: Literal["a", "b"]
    """a: the sender of the pair; b: the receiver, wider and deeper."""
    out: Path
    """New folder for the checkpoint."""
    steps: int = 5000
    seed: int = 0
    learning_rate: float = 2e-3


def make_tokenizer(vocab: int = 4096, sample: int = 20_000) -> tokenizers.Tokenizer:
    """Byte-level BPE learned from the training text; begins every text with BOS."""
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
    shape = SHAPES[model]
    return ModelConfig(
        vocab=vocab,
        **shape,
        kv_heads=shape["heads"],
        head_dim=32,
        max_positions=256,
        norm_eps=1e-5,
        rope=Rope(theta=10_000.0),
    )


def batches(tokenizer: tokenizers.Tokenizer, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents of all kinds, bucketed by length: tokens [B, T], right-padded with EOS, and the weight [B, T] of each
    token in the loss."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)

    def encode(document: Document) -> tuple[list[int], list[float]]:
        pieces = tokenizer.encode_batch([text for text, _ in document], add_special_tokens=False)
        ids, weights = [bos], [0.0]
        for piece, (_, weight) in zip(pieces, document, strict=True):
            ids += piece.ids
            weights += [weight] * len(piece.ids)
        return [*ids, eos], [*weights, document[-1][1]]

    waiting = {columns: [] for columns in COLUMNS}
    for document in itertools.chain.from_iterable(zip(*(documents(kind, seed + i) for i, kind in enumerate(MIXTURE)), strict=True)):
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
    """Weighted next-token cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(forward(params, tokens)[:, :-1], tokens[:, 1:])
    return jnp.sum(losses * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def train(args: Train, callback=None) -> tuple[Params, tokenizers.Tokenizer]:
    tokenizer = make_tokenizer()
    params = init(jax.random.key(args.seed), make_config(args.model, tokenizer.get_vocab_size()))
    if jax.default_backend() == "cpu":
        params = params.unroll()
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, 200, args.steps, args.learning_rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    state = optimizer.init(params)

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, tokens, weights):
        value, gradient = jax.value_and_grad(loss)(params, tokens, weights)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    stream = batches(tokenizer, args.seed + 1)
    bar = tqdm.trange(args.steps, desc=f"training {args.model}", mininterval=5)
    smooth = None
    for n in bar:
        params, state, value = step(params, state, *next(stream))
        smooth = float(value) if smooth is None else 0.98 * smooth + 0.02 * float(value)
        if callback: callback(params, tokenizer, n)
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
    return params.stack(), tokenizer
