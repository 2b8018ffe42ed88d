"""Pictures of a comparison: losses against the step, and accuracy against the number of training texts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .trials import Done

COLOURS = ("#1f5fa8", "#7fb0e0", "#3a8f4d", "#93cfa0", "#8a4fa3", "#c9a3dc", "#b8862b")


def losses(lines: Sequence[Mapping[str, Any]], done: Done, window: int = 20) -> bytes:
    """Draws the loss of every trained arm against the step, smoothed over `window` steps.

    Thin lines are single seeds; the thick line is their mean.

    Args:
        lines: The lines of results.jsonl.
        done: The finished trainings, by arm, learning rate and seed.
        window: Largest number of steps in a running mean.

    Returns:
        The bytes of a PNG. The loss is in nats per token, on a logarithmic axis.
    """
    figure, axis = _axis()
    for color, line in zip(_colours(lines), [line for line in lines if line.get("learning_rate")], strict=True):
        own = [
            row["losses"]
            for (arm, rate, _), row in sorted(done.items(), key=lambda x: x[0])
            if (arm, rate) == (line["arm"], line["learning_rate"])
        ]
        shortest = min(map(len, own))  # a diverged run has fewer steps
        if not shortest:
            continue
        wide = min(window, shortest)
        smooth = [np.convolve(x, np.ones(wide) / wide, "valid") for x in own]
        steps = np.arange(shortest - wide + 1) + wide
        for one in smooth:
            axis.plot(np.arange(len(one)) + wide, one, color=color, linewidth=0.6, alpha=0.5)
        label = f"{line['arm']}, {line['numbers']:,} numbers, rate {line['learning_rate']:g}"
        axis.plot(steps, np.mean([one[: len(steps)] for one in smooth], axis=0), color=color, linewidth=2, label=label)
    axis.set(xlabel="step", ylabel=f"loss, nats a token (mean of {window} steps)", yscale="log")
    return _png(figure, axis)


def learning(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Draws exact match against the number of training texts, with bands of the 95 % intervals over the seeds.

    Args:
        lines: The lines of results.jsonl, of several numbers of examples.

    Returns:
        The bytes of a PNG.
    """
    figure, axis = _axis()
    trained = [line for line in lines if line.get("learning_rate")]
    names = list(dict.fromkeys(line["arm"] for line in trained))
    for color, name in zip(_colours(trained), names, strict=False):
        own = [line for line in trained if line["arm"] == name]
        amounts = [line["examples"] for line in own]
        value, low, high = (100 * np.array([line[key] for line in own]) for key in ("accuracy", "low", "high"))
        axis.plot(amounts, value, "o-", color=color, label=name, markersize=4)
        axis.fill_between(amounts, np.clip(low, 0, 100), np.clip(high, 0, 100), color=color, alpha=0.15, linewidth=0)
    alone = next(line for line in lines if not line.get("rates"))
    axis.axhline(100 * alone["accuracy"], color="0.5", linestyle=":", label=alone["arm"])
    axis.set(xlabel="number of training texts", ylabel="exact match, %", xscale="log", ylim=(-2, 102))
    axis.set_xticks(amounts := sorted({line["examples"] for line in trained}), map(str, amounts))
    axis.minorticks_off()
    return _png(figure, axis)


def _colours(lines: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    count = len({line["arm"] for line in lines if line.get("learning_rate")})
    return [*COLOURS[: count - 1], COLOURS[-1]]  # the edges come last


def _axis() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    return figure, figure.add_subplot()


def _png(figure: Any, axis: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axis.legend(frameon=False, fontsize="small")
    axis.grid(alpha=0.3)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
