"""Every (graft, k, j) of activation communication in one program.

The cells of a sweep differ only in B's last prompt token above layer j, and in the tokens that B generates after it. So A
reads its prompts once (the last token's h_A at all layers), B reads its prompts once (`communication.read_prompt`), and
every cell continues from there (`programs`). Nothing is read twice, and no program depends on the layers that are tried.

`sweep` decodes. Each game has a number of slots. When the cell in a slot stops, the slot takes the game's next cell, so
no cell waits for a longer one. At every step all slots write to the same column of their caches, in a ring; only
`positions` says where a token belongs. `sweep_answers` does not decode. Below layer j the streams of the given answers
are the same in every cell, so they are computed once. Each cell then runs blocks j + 1 .. L_B on the answer's tokens, all
in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from jaxcomm.communication import check_games
from jaxcomm.config import AnyArray
from jaxcomm.layer_sweep.patching import Patching, patch
from jaxcomm.layer_sweep.plan import Grid, Plan, Progress, SweepOptions
from jaxcomm.layer_sweep.sizes import Chunk, Sizes
from jaxcomm.model import Params
from jaxcomm.prompts import Prompts, as_prompts

__all__ = [
    "AnswerSweep",
    "Chunk",
    "Grid",
    "Patching",
    "Plan",
    "Sizes",
    "Sweep",
    "SweepOptions",
    "by_length",
    "patch",
    "sweep",
    "sweep_answers",
]


class Sweep(struct.PyTreeNode):
    """B's replies in every cell of a sweep. F grafts, K layers of A, J layers of B, G items, T new tokens.

    Attributes:
        tokens: Token ids [F, K, J, G, T]; -1 after the end of a row.
        logprobs: Log-probability of each token in nats, [F, K, J, G, T]. 0 after the end of a row.
        lengths: Number of tokens [F, K, J, G]. A stop token counts.
        forwarded: Number of tokens that went through all of B's blocks for the cells, including idle slots.

    Example:
        >>> jc.sweep(params, params, prompts, prompts, ks=[3], js=[1], max_new_tokens=2).lengths.shape
        (1, 1, 1, 2)
    """

    tokens: Int[np.ndarray, "F K J G T"]
    logprobs: Float[np.ndarray, "F K J G T"]
    lengths: Int[np.ndarray, "F K J G"]
    forwarded: Int[np.ndarray, ""]


class AnswerSweep(struct.PyTreeNode):
    """Scores of given answers in every cell of a sweep. F grafts, K layers of A, J layers of B, G items.

    Attributes:
        exact: Whether greedy decoding gives the answer, [F, K, J, G].
        logprobs: Log-probability of each token of the answer in nats, [F, K, J, G, T]; 0 after its end. With stop
            tokens T is one more: the column after the answer is the log-probability that one of them follows.

    Example:
        >>> answers = np.array([[5], [6]])
        >>> found = jc.sweep_answers(params, params, prompts, prompts, answers, ks=[3], js=[1, 2])
        >>> found.exact.shape
        (1, 1, 2, 2)
    """

    exact: Bool[np.ndarray, "F K J G"]
    logprobs: Float[np.ndarray, "F K J G T"]


def sweep(
    params_a: Params,
    params_b: Params,
    prompts_a: Prompts | AnyArray,
    prompts_b: Prompts | AnyArray,
    *,
    ks: Sequence[int],
    js: Sequence[int],
    **options: Unpack[SweepOptions],
) -> Sweep:
    """Generates B's reply in every cell: `communicate` at every (graft, k, j), for every item.

    This is the search of Ramesh & Li (2025, section 4.1 and Figure 2).

    Args:
        params_a: The sender A.
        params_b: The receiver B.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts, one for each item.
        ks: Layers of A, 0 .. L_A each.
        js: Layers of B, 0 .. L_B each.
        **options: Options of `SweepOptions`.

    Returns:
        The generated tokens, on the host.

    Raises:
        ValueError: `ks`, `js` or `grafts` is empty, repeats a value, or has a value out of range; the numbers of prompts
            differ; a prompt is too long; the maps have a wrong shape; `memory` is too small for one cell.

    Example:
        >>> jc.sweep(params, params, prompts, prompts, ks=[1, 3], js=[0, 2, 4], max_new_tokens=2).tokens.shape
        (1, 2, 3, 2, 2)
    """
    progress = options.pop("progress", None)
    grid = Grid(ks, js, options.pop("grafts", ("replace",)), options.pop("maps", None))
    plan = Plan(params_a, params_b, prompts_a, prompts_b, grid, **options)
    out = _run(plan, _counted(progress, len(plan.grid.cells) * plan.games))
    return Sweep(lengths=(out["tokens"] >= 0).sum(axis=-1), **out)


def sweep_answers(
    params_a: Params,
    params_b: Params,
    prompts_a: Prompts | AnyArray,
    prompts_b: Prompts | AnyArray,
    answers: Int[AnyArray, "_ T"],
    *,
    ks: Sequence[int],
    js: Sequence[int],
    **options: Unpack[SweepOptions],
) -> AnswerSweep:
    """Scores given answers in every cell of a sweep, without decoding.

    It computes the log-probability of each answer, and whether greedy decoding would give it.

    Greedy decoding gives a token sequence if and only if each of its tokens is the argmax when the model reads the
    sequence. Answers of similar length are scored together, with one program for each group (`by_length`). Scores are for
    these tokens: if the same string can be tokenized differently, decoding may give the string in other tokens.

    Args:
        params_a: The sender A.
        params_b: The receiver B.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts, one for each item.
        answers: Token ids [G, T]; -1 after the end of an answer. With `stop_tokens`, any one of them must follow the
            answer.
        ks: Layers of A, 0 .. L_A each.
        js: Layers of B, 0 .. L_B each.
        **options: Options of `SweepOptions`. Of the decoding options, only `stop_tokens` applies.

    Returns:
        Exact matches and log-probabilities, on the host.

    Raises:
        ValueError: As for `sweep`; an answer is empty or holds a stop token; there is not one answer for each item.

    Example:
        >>> answers = np.array([[5, 6], [7, -1]])
        >>> found = jc.sweep_answers(params, params, prompts, prompts, answers, ks=[1, 3], js=[2])
        >>> found.logprobs.shape
        (1, 2, 1, 2, 2)
    """
    answers, prompts = np.asarray(answers), [as_prompts(prompts_a), as_prompts(prompts_b)]
    check_games(*prompts)
    grid = Grid(ks, js, options.pop("grafts", ("replace",)), options.pop("maps", None))
    found: dict[str, np.ndarray] = {}
    tell = _counted(options.pop("progress", None), len(grid.cells) * len(answers))
    alike = len(answers) == len(prompts[0])  # else `Plan` refuses them
    for rows in by_length(answers) if alike else [slice(None)]:
        asked = prompts[0][rows], prompts[1][rows]
        plan = Plan(params_a, params_b, *asked, grid, shortened(answers[rows]), **options)
        ends = len(plan.stop_tokens) > 0
        for name, part in _run(plan, tell).items():
            longest = (answers.shape[1] + ends,) if name == "logprobs" else ()
            whole = found.setdefault(name, np.zeros((*part.shape[:3], len(answers), *longest), part.dtype))
            whole[(slice(None),) * 3 + (rows,) + ((slice(part.shape[-1]),) if longest else ())] = part
    return AnswerSweep(**found)


def _run(plan: Plan, tell: Callable[[int], None]) -> dict[str, np.ndarray]:
    results = []
    for chunk in plan.chunks:
        results.append(plan.run(chunk))
        tell(len(chunk.games) * len(chunk.cells))
    return plan.gather(results)


def _counted(progress: Progress | None, every: int) -> Callable[[int], None]:
    """A function to call with the number of newly finished cells. It calls `progress`."""
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, every)

    return tell


def by_length(answers: Int[AnyArray, "G T"]) -> list[np.ndarray]:
    """Groups games whose answers have similar lengths, so that short answers do not take as long as the longest.

    There are few groups, because each needs its own compiled program.

    Args:
        answers: Token ids [G, T]; -1 after the end of an answer.

    Returns:
        Indices of the games of each group.
    """
    lengths = np.maximum((np.asarray(answers) >= 0).sum(axis=1), 1)
    classes = np.where(lengths <= 4, lengths, 2 ** np.ceil(np.log2(lengths)).astype(int))
    groups, held = [], np.array([], int)
    for size in np.unique(classes):
        held = np.concatenate([held, np.flatnonzero(classes == size)])
        if len(held) >= max(4, len(lengths) // 8):
            groups, held = [*groups, np.sort(held)], held[:0]
    if len(held):  # too few games with the longest answers: merge them with the group before
        groups[-1:] = [np.sort(np.concatenate([*groups[-1:], held]))]
    return groups


def shortened(answers: np.ndarray) -> np.ndarray:
    """Removes the columns in which no answer has a token.

    Args:
        answers: Token ids [G, T]; -1 after the end of an answer.

    Returns:
        The answers, with fewer columns.
    """
    used = np.flatnonzero((answers >= 0).any(axis=0))
    return answers[:, : used[-1] + 1] if len(used) else answers
