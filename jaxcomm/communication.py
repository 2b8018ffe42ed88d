"""Activation communication (Ramesh & Li, ICML 2025, section 3.1): pause A after layer k and B after layer j, replace
B's state b by f(a, b), where a is A's state, and let B continue.

`communicate` calls `messages.read_message` (A's side), then `generate` with an edit that receives the message (B's side).
B's state is edited once, while B reads its prompt. The resulting keys and values stay in the cache, so every later
token attends to them. To try many edits of one prompt, read it once with `read_prompt` and call `resume` for each edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxcomm.cache import Attended, KVCache
from jaxcomm.compiled import check_layer, compiled
from jaxcomm.config import AnyArray
from jaxcomm.decoding import Decoding, Generation, generate
from jaxcomm.edits import Edit, Read, hook_of
from jaxcomm.language_model import check_room, positions_of
from jaxcomm.messages import read_message, receive
from jaxcomm.model import Params, enter, run, run_blocks, unembed
from jaxcomm.prompts import Prompts, as_prompts
from jaxcomm.sharding import deliver
from jaxcomm.sites import Site


def communicate(
    params_a: Params,
    params_b: Params,
    prompts_a: Prompts | AnyArray,
    prompts_b: Prompts | AnyArray,
    *,
    k: Any,
    j: Any,
    graft: Any = "replace",
    **options: Unpack[Decoding],
) -> Generation:
    """Generates B's reply with A's activation grafted into B (Ramesh & Li 2025, section 3.1).

    A's side and B's side are separate compiled programs. They run on different devices if the models do. New prompts of
    the same shapes, or another k and j, trigger no recompilation. If `graft` is a function, it is part of B's program:
    define it once. `communicate` is pure: it works under jit, vmap (over a further axis of games, k or j) and scan.

    Args:
        params_a: The sender A.
        params_b: The receiver B.
        prompts_a: A's prompts, one for each item: `Prompts`, or tokens [B, P] without padding.
        prompts_b: B's prompts, one for each item.
        k: A is read after this layer, at the last token: 0 .. L_A, an int or traced. Or any `Site`.
        j: B is edited after this layer, at the last token: 0 .. L_B, an int or traced. Or any `Site`.
        graft: "sum", "mean", "replace", a function f(a, b), or `Graft(f, W)` with a map.
        **options: Options of `Decoding`.

    Returns:
        B's replies.

    Raises:
        ValueError: k or j is out of range; a prompt is empty or too long; the numbers of prompts differ; there is no
            such graft; W has a wrong shape.

    Example:
        >>> jc.communicate(params, params, prompts, prompts, k=3, j=1, max_new_tokens=2).tokens.shape
        (2, 2)
    """
    prompts_a, prompts_b = as_prompts(prompts_a), as_prompts(prompts_b)
    check_games(prompts_a, prompts_b)
    for params, layer, name in ((params_a, k, "k"), (params_b, j, "j")):
        if not isinstance(layer, Site):
            check_layer(params, layer, name)
    message = deliver(read_message(params_a, prompts_a, site=k), params_b)
    return generate(params_b, prompts_b, edits=[receive(message, j, graft)], **options)


def check_games(prompts_a: Prompts, prompts_b: Prompts) -> None:
    """Raises ValueError unless A and B have one prompt each for every item."""
    if len(prompts_a) != len(prompts_b):
        raise ValueError(f"A has {len(prompts_a)} prompts, B has {len(prompts_b)}: give one of each per item")


@compiled(
    prompts={"prompts_a": "params_a", "prompts_b": "params_b"},
    layers={"k": "params_a", "j": "params_b"},
    texts={"answers": "params_b"},
    static=("graft",),
)
def communicate_logits(
    params_a: Params,
    params_b: Params,
    prompts_a: Prompts,
    prompts_b: Prompts,
    answers: Int[AnyArray, "B T"],
    *,
    k: Any,
    j: Any,
    graft: Any = "replace",
) -> Float[Array, "B T V"]:
    """Computes the logits that predict each token of given answers, with A's activation grafted into B.

    This is the teacher-forced version of `communicate`: one forward pass, no decoding loop. It is differentiable in every
    continuous input. Reverse mode also works if k is an int. So a loss on B's answer has gradients in W, A and B.

    Args:
        params_a: The sender A.
        params_b: The receiver B.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts, one for each item.
        answers: Token ids [B, T] that follow B's prompts; -1 after the end of an answer.
        k: A is read after this layer, as in `communicate`.
        j: B is edited after this layer, as in `communicate`.
        graft: How A's activation enters B, as in `communicate`.

    Returns:
        Logits [B, T, V], float32.

    Raises:
        ValueError: As for `communicate`; there is not one answer for each prompt; a token is outside the vocabulary, or
            follows a -1.

    Example:
        >>> answers = np.array([[7, 8], [9, -1]])
        >>> jc.communicate_logits(params, params, prompts, prompts, answers, k=3, j=1).shape
        (2, 2, 256)
    """
    check_games(prompts_a, prompts_b)
    edit = receive(read_message(params_a, prompts_a, site=k), j, graft)
    return _follow(params_b, prompts_b, answers, [edit])


@compiled(texts={"answers": "params"})
def answer_logits(
    params: Params, prompts: Prompts, answers: Int[AnyArray, "B T"], *, edits: Sequence[Edit] = ()
) -> Float[Array, "B T V"]:
    """Computes the logits that predict each token of given answers after edited prompts.

    This is the teacher-forced version of `generate`: one forward pass, no decoding loop. It is differentiable in the
    weights and in the arrays that the edits hold, in reverse mode too.

    Args:
        params: The model.
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        answers: Token ids [B, T] that follow the prompts; -1 after the end of an answer.
        edits: Edits of the prompts' states.

    Returns:
        Logits [B, T, V], float32.

    Raises:
        ValueError: There is not one answer for each prompt; a token is outside the vocabulary, or follows a -1;
            the prompts or an edit are invalid.

    Example:
        >>> edit = jc.Edit(jc.Site("mlp_out", 2, "all"), jc.scale(0.0))
        >>> jc.answer_logits(params, prompts, np.array([[7, 8], [9, -1]]), edits=[edit]).shape
        (2, 2, 256)
    """
    return _follow(params, prompts, answers, edits)


def _follow(params: Params, prompts: Prompts, answers: Int[AnyArray, "B T"], edits: Sequence[Edit]) -> Array:
    """`answer_logits`, inside a compiled program."""
    if len(answers) != len(prompts):
        raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts: give one for each")
    columns, T = prompts.shape[1], answers.shape[1]
    tokens = jnp.concatenate([jnp.asarray(prompts.tokens), answers], axis=1)
    check_room(params, Prompts(tokens))
    places = positions_of(prompts)
    following = jnp.max(places, axis=1, keepdims=True) + 1 + jnp.arange(T, dtype=jnp.int32)
    positions = jnp.concatenate([places, jnp.where(answers < 0, -1, following)], axis=1)
    hook = hook_of(params, places, edits).within(columns)
    return run(params, tokens, positions, hook)[0][:, columns - 1 : -1]


class ReadPrompt(struct.PyTreeNode):
    """B's prompts, read once: everything that an edit of their last tokens leaves unchanged.

    Attributes:
        states: The last token's h[0] .. h[L_B], [L_B + 1, B, D_B].
        earlier: Keys and values of the tokens before it. Its own column is marked empty.
        last: Keys and values of the last token, one column.
        token: Id of the last token, [B], or its vector [B, D].
    """

    states: Float[Array, "_ B D"]
    earlier: KVCache
    last: KVCache
    token: Int[Array, "B"] | Float[Array, "B D"]


@compiled(prompts={"prompts": "params"})
def read_prompt(params: Params, prompts: Prompts, *, past: Sequence[KVCache] = ()) -> ReadPrompt:
    """Reads B's prompts once, so that many edits of their last tokens can be tried.

    Args:
        params: The receiver.
        prompts: Its prompts.
        past: Key/value caches of the tokens before the prompts. They are not changed.

    Returns:
        The state that `resume` continues from.

    Raises:
        ValueError: The prompts have no token, do not fit the model's positions, or are invalid.
    """
    check_room(params, prompts)
    positions = positions_of(prompts, past)
    reads = [Read(Site("resid_post", 0, "last"), tuple(range(params.config.layers + 1)))]
    tokens = jnp.asarray(prompts.tokens)
    (states,), earlier, last = read_in_two(params, tokens, positions, reads, tail=1, past=past, last=True)
    return ReadPrompt(states, earlier, last, tokens[:, -1])


def read_in_two(
    params: Params,
    tokens: Int[AnyArray, "B T"] | Float[AnyArray, "B T D"],
    positions: Int[Array, "B T"],
    reads: Sequence[Read],
    *,
    tail: int,
    past: Sequence[KVCache] = (),
    last: bool = False,
) -> tuple[list[Array], KVCache, KVCache]:
    """Reads tokens, and separates the cache of the last ones, so that only they can be read again.

    Linear attention keeps one state of all tokens. A model that has it therefore reads the two parts one after the other.

    Args:
        params: The model.
        tokens: Token ids [B, T], or vectors [B, T, D].
        positions: Their positions.
        reads: What to read on the way, at the last token or at all tokens.
        tail: Number of last tokens in the second cache.
        past: Key/value caches of the tokens before.
        last: Whether only the last token's states are needed.

    Returns:
        What was read, the cache of the earlier tokens, and the cache of the last ones.
    """

    tokens = jnp.asarray(tokens)

    def run_on(tokens: Array, places: Array, past: Sequence[KVCache]) -> tuple[list[Array], KVCache]:
        h, hook = enter(params, tokens, places, hook_of(params, places, reads=reads))
        attended = Attended(past, params.empty_cache(*places.shape))
        _, cache, found = run_blocks(params, h, places, attended=attended, hook=hook, last=last)
        return list(found), cache.replace(positions=places)

    if not params.config.recurrent:
        found, cache = run_on(tokens, positions, past)
        end = lambda tree: jax.tree.map(lambda a: a[..., -tail:, :], tree)
        rest = KVCache(end(cache.k), end(cache.v), positions[:, -tail:])
        return found, cache.replace(positions=positions.at[:, -tail:].set(-1)), rest
    # One column of padding, in case that there is no token before the last ones.
    tokens = jnp.pad(tokens, [(0, 0), (1, 0), *[(0, 0)] * (tokens.ndim - 2)])
    positions = jnp.pad(positions, [(0, 0), (1, 0)], constant_values=-1)
    before, earlier = run_on(tokens[:, :-tail], positions[:, :-tail], past)
    found, rest = run_on(tokens[:, -tail:], positions[:, -tail:], (*past, earlier))
    whole = lambda read, x, y: y if read.site.single else jnp.concatenate([x[:, :, 1:], y], axis=2)
    return [whole(*three) for three in zip(reads, before, found, strict=True)], earlier, rest


@compiled(prompts={}, layers={"j": "params"})
def resume(
    params: Params, prompt: ReadPrompt, h: Float[Array, "B D"], j: Any, *, past: Sequence[KVCache] = ()
) -> tuple[Float[Array, "B V"], KVCache]:
    """Continues from an edited h_B[j] of the prompts' last tokens. Blocks j + 1 .. L_B run on one token of each row.

    Args:
        params: The receiver.
        prompt: Result of `read_prompt`.
        h: The edited states [B, D].
        j: The layer that they belong to, 0 .. L_B.
        past: The same caches that were given to `read_prompt`.

    Returns:
        Logits [B, V] of the next token, and the cache of the edited one. Call `decode` with them and
        past=(*past, prompt.earlier). `prefill` with the same edit gives the same logits.

    Raises:
        ValueError: j is out of range.
    """
    attended = Attended((*past, prompt.earlier), prompt.last, column=0)
    h, cache, _ = run_blocks(params, h[:, None], prompt.last.positions, (j, None), attended=attended)
    return unembed(params, h)[:, 0], cache
