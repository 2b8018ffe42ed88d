"""Figures: maps of layer sweeps, as PNG and as an interactive HTML page; accuracy of protocols against their cost."""

from __future__ import annotations

import dataclasses
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from plotly.graph_objects import Figure

    from .effects import Split
    from .scores import Interval

MapStyle = Literal["cells", "contours"]
"""Style of layer maps: one colour for each pair of layers, or filled contours."""

J_AXIS = "j: layer of B after which it is grafted in"
K_AXIS = "k: layer of A that is sent"
PAGE_COLUMNS = 3
STYLE = """
:root { color-scheme: light }
body { max-width: 1160px; margin: 24px auto; padding: 0 16px; font: 15px/1.5 sans-serif; color: #222; background: #fff }
pre { padding: 12px; overflow-x: auto; font-size: 13px; line-height: 1.4; background: #f5f5f5 }
"""


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """A value at every pair of layers (k, j) of a sweep.

    Attributes:
        title: Title of the map.
        values: Finite values [K, J].
        ks: Layers of A [K], ascending.
        js: Layers of B [J], ascending.
        best: The pair (k, j) to mark.
    """

    title: str
    values: np.ndarray
    ks: Sequence[int]
    js: Sequence[int]
    best: tuple[int, int]

    @property
    def best_value(self) -> float:
        """The value at the marked pair of layers."""
        k, j = self.best
        return float(self.values[self.ks.index(k), self.js.index(j)])


def span(maps: Sequence[LayerMap]) -> tuple[float, float]:
    """Finds the range of the values of all maps.

    Args:
        maps: The maps.

    Returns:
        The smallest and the largest value. If they are equal, 0.5 below and 0.5 above them.
    """
    low, high = float(min(m.values.min() for m in maps)), float(max(m.values.max() for m in maps))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def edges(layers: Sequence[int]) -> np.ndarray:
    """Computes the edges of a map's cells.

    Args:
        layers: Layers [N], ascending.

    Returns:
        The edges [N + 1]: halfway between neighbours, and half a layer beyond the first and the last.

    Example:
        >>> edges([2, 4, 8]).tolist()
        [1.5, 3.0, 6.0, 8.5]
    """
    middles = np.add(layers[1:], layers[:-1]) / 2
    return np.concatenate([[layers[0] - 0.5], middles, [layers[-1] + 0.5]])


def ticks(layers: Sequence[int]) -> list[int]:
    """Selects at most twelve of the layers, evenly spaced, for the ticks of an axis."""
    return list(layers[:: -(-len(layers) // 12)])


def inward(layers: Sequence[int], layer: int) -> int:
    """Finds the direction in which a label beside a layer has more room.

    Args:
        layers: The layers of the axis, ascending.
        layer: One of them.

    Returns:
        1 (towards higher layers) or -1 (towards lower ones).
    """
    return 1 if 2 * layer <= layers[0] + layers[-1] else -1


def layer_maps(
    maps: Sequence[LayerMap],
    *,
    label: str,
    columns: int,
    limits: tuple[float, float] | None = None,
    style: MapStyle = "cells",
) -> bytes:
    """Draws layer maps. The best cell of each map has a star.

    Args:
        maps: The maps. They share one colour bar.
        label: Label of the colour bar.
        columns: Number of maps in a row.
        limits: Ends of the colour bar. Default: the smallest and the largest value of all maps.
        style: "cells": one colour for each pair of layers. "contours": filled contours, as in Ramesh & Li (2025),
            Figure 2. Contours interpolate, so they show values between layers, which do not exist.

    Returns:
        The bytes of a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    levels = np.asarray(MaxNLocator(nbins=12).tick_values(*(limits or span(maps))))
    norm = BoundaryNorm(levels, ncolors=256, clip=True)
    rows = -(-len(maps) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 4.1 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(maps) :]:
        axis.axis("off")
    for axis, layer_map in zip(axes.flat, maps, strict=False):
        draw(axis, layer_map, norm, levels if style == "contours" else None)
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label=label, ticks=levels)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    plt.close(figure)
    return png.getvalue()


def draw(axis: Axes, layer_map: LayerMap, norm: Normalize, levels: np.ndarray | None = None) -> None:
    """Draws one map with its star.

    Args:
        axis: The axes to draw on.
        layer_map: The map.
        norm: How values become colours.
        levels: Values at which contours change colour. None: draw cells. A map of one k or one j is always drawn as
            cells.
    """
    ks, js, (k, j) = layer_map.ks, layer_map.js, layer_map.best
    if levels is not None and min(layer_map.values.shape) > 1:
        axis.contourf(js, ks, layer_map.values, levels=levels, norm=norm, cmap="viridis")
    else:
        axis.pcolormesh(edges(js), edges(ks), layer_map.values, norm=norm, cmap="viridis")
    axis.plot(j, k, "*", color="red", markeredgecolor="white", markersize=15, clip_on=False, zorder=3)
    right, up = inward(js, j), inward(ks, k)
    axis.annotate(
        f"{layer_map.best_value:.3g}",
        (j, k),
        (9 * right, 9 * up),
        textcoords="offset points",
        ha="left" if right > 0 else "right",
        va="bottom" if up > 0 else "top",
        bbox=dict(boxstyle="round,pad=0.2", facecolor="white", edgecolor="none", alpha=0.8),
    )
    axis.set_title(layer_map.title, fontsize="medium", parse_math=False)
    axis.set(xlabel=J_AXIS, ylabel=K_AXIS, xticks=ticks(js), yticks=ticks(ks))


def effects(splits: Mapping[str, Split], *, label: str) -> bytes:
    """Draws the effects of messages: total, presence and content of every channel, with 95 % intervals.

    Args:
        splits: Name of each channel -> its split, as shares.
        label: Label of the axis.

    Returns:
        The bytes of a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 1.3 + 0.75 * len(splits)), dpi=130, layout="constrained")
    styles = {"total": ("black", "o"), "presence": ("#d55e00", "s"), "content": ("#0072b2", "D")}
    for row, found in enumerate(splits.values()):
        for n, part in enumerate(found._fields):
            x, (colour, mark) = getattr(found, part).value, styles[part]
            bar = [[100 * (x.value - x.low)], [100 * (x.high - x.value)]]
            how: dict[str, Any] = dict(color=colour, capsize=3, markersize=6, label=part if row == 0 else None)
            axis.errorbar(100 * x.value, row + 0.24 * (n - 1), xerr=bar, fmt=mark, **how)
    axis.axvline(0, color="0.6", linewidth=0.9, zorder=0)
    axis.set_yticks(range(len(splits)), list(splits), parse_math=False)
    axis.set(ylim=(len(splits) - 0.5, -0.5), xlabel=label)
    axis.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    plt.close(figure)
    return png.getvalue()


def page(title: str, groups: Mapping[str, tuple[str, Sequence[LayerMap]]], text: str) -> str:
    """Writes one HTML page with a text and interactive maps. It needs no network.

    Pointing at a cell shows its k, j and value.

    Args:
        title: Title of the page.
        groups: Heading -> the label of the colour bar, and the maps that share it.
        text: Text above the maps.

    Returns:
        The page.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(text)}</pre>"]
    for index, (heading, (label, maps)) in enumerate(groups.items()):
        # Name every div, because plotly's default names are random. Include the script only once, since it has 5 MB. Hide
        # the tool bar, which would cover the titles.
        figure = heat_maps(label, maps).to_html(
            full_html=False,
            include_plotlyjs=index == 0,
            div_id=f"group-{index}",
            config={"displayModeBar": False},
        )
        parts += [f"<h2>{html.escape(heading)}</h2>", figure]
    return document(title, STYLE, parts)


def document(title: str, style: str, parts: Sequence[str]) -> str:
    """Joins parts into one HTML page that needs no other file.

    Args:
        title: Title of the page.
        style: Style sheet.
        parts: HTML of the parts.

    Returns:
        The page.
    """
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""


def heat_maps(label: str, maps: Sequence[LayerMap]) -> Figure:
    """Draws interactive heat maps, three in a row. The best cell of each map has a star.

    Args:
        label: Label of the colour bar.
        maps: The maps. They share one colour bar.

    Returns:
        A plotly figure.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    columns = min(PAGE_COLUMNS, len(maps))
    rows = -(-len(maps) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[markup(m.title) for m in maps],
        horizontal_spacing=0.22 / columns,
        vertical_spacing=0.3 / rows,
    )
    for index, layer_map in enumerate(maps):
        row, column = index // columns + 1, index % columns + 1
        ks, js, (k, j) = list(layer_map.ks), list(layer_map.js), layer_map.best
        values = layer_map.values.tolist()
        hover = "k = %{y}<br>j = %{x}<br>%{z:.4~g}<extra></extra>"
        figure.add_trace(go.Heatmap(x=js, y=ks, z=values, hovertemplate=hover, coloraxis="coloraxis"), row, column)
        star = dict(symbol="star", size=14, color="red", line=dict(color="white", width=1))
        figure.add_trace(go.Scatter(x=[j], y=[k], mode="markers", marker=star, hoverinfo="skip"), row, column)
        figure.add_annotation(
            x=j,
            y=k,
            text=f"{layer_map.best_value:.3g}",
            showarrow=False,
            xshift=24 * inward(js, j),
            yshift=16 * inward(ks, k),
            bgcolor="rgba(255, 255, 255, 0.8)",
            row=row,
            col=column,
        )
        for update, axis_title, layers in ((figure.update_xaxes, J_AXIS, js), (figure.update_yaxes, K_AXIS, ks)):
            first, *_, last = edges(layers).tolist()
            update(title=dict(text=axis_title, standoff=6, font=dict(size=12)), row=row, col=column)
            update(tickvals=ticks(layers), tickangle=0, range=[first, last], row=row, col=column)
    low, high = span(maps)
    bar = dict(title=dict(text=markup(label), side="right"))
    figure.update_annotations(font_size=13)
    figure.update_layout(
        template="plotly_white",
        width=340 * columns + 110,
        height=380 * rows,
        margin=dict(l=60, r=20, t=60, b=50),
        showlegend=False,
        coloraxis=dict(colorscale="Viridis", cmin=low, cmax=high, colorbar=bar),
    )
    return figure


def markup(text: str) -> str:
    """Escapes a text for plotly, which would otherwise interpret tags in titles."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def lines(
    xs: Sequence[float],
    panels: Mapping[tuple[str, str], Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    x: str,
) -> bytes:
    """Draws one line for each series, and a dashed line for its control, in rows and columns of panels.

    Args:
        xs: Horizontal positions of the points.
        panels: (name of the row, label of the column) -> series by name: its values, and its control's values.
        x: Label of the horizontal axis.

    Returns:
        The bytes of a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = (list(dict.fromkeys(key[n] for key in panels)) for n in (0, 1))
    size = (5.6 * len(columns), 3.6 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, dpi=130, squeeze=False, layout="constrained")
    for (row, column), series in panels.items():
        axis = axes[rows.index(row), columns.index(column)]
        for n, (name, (own, other)) in enumerate(series.items()):
            axis.plot(xs, own, "o-", color=f"C{n}", markersize=4, label=name)
            axis.plot(xs, other, "--", color=f"C{n}", linewidth=1, alpha=0.6)
        axis.set(xlabel=x, ylabel=column)
        axis.set_title(row, fontsize="medium", parse_math=False)
        axis.xaxis.get_major_locator().set_params(integer=all(float(x).is_integer() for x in xs))
        axis.grid(alpha=0.25)
    axes[0, 0].plot([], [], "--", color="0.5", label="another item's")
    axes[0, 0].legend(fontsize="small", frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    plt.close(figure)
    return png.getvalue()


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost and accuracy of a protocol.

    Attributes:
        name: Name of the protocol.
        amount: Its cost per question: FLOPs, or bytes sent. Above 0.
        value: Accuracy, as a share.
        low: Lower end of its interval.
        high: Upper end of its interval.
        control: Whether it is a control. Controls are drawn in grey.
    """

    name: str
    amount: float
    value: float
    low: float
    high: float
    control: bool = False


def costs(rows: Mapping[str, Mapping[str, Sequence[Cost]]], *, label: str) -> bytes:
    """Draws accuracy against cost, as in Ramesh & Li (2025), Figure 3.

    Args:
        rows: Kind of cost ("FLOPs a question") -> the panels of a row: title -> points. Each panel has at least one.
        label: Label of the accuracy.

    Returns:
        The bytes of a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(map(len, rows.values()))
    size = (6.6 * columns, 4.8 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, dpi=130, squeeze=False, layout="constrained")
    drawn, colours = [], palette([p for panels in rows.values() for points in panels.values() for p in points])
    for line, (amount, panels) in zip(axes, rows.items(), strict=True):
        for axis, (title, points) in zip(line, panels.items(), strict=False):
            draw_costs(axis, points, colours)
            axis.set_title(title, fontsize="medium", parse_math=False)
            axis.set(xlabel=amount, ylabel=label)
            drawn.append((axis, points))
        for axis in line[len(panels) :]:
            axis.set_axis_off()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in free space, so the layout must not change any more
    for axis, points in drawn:
        name_points(axis, points)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    plt.close(figure)
    return png.getvalue()


def every_cost(points: Mapping[str, Sequence[tuple[str, float, float, Interval]]]) -> bytes | None:
    """Draws accuracy against FLOPs, and against the bytes that agents send to each other.

    Args:
        points: Title of each panel -> its points: name of the protocol, FLOPs and bytes of a question, accuracy with its
            interval. A name with a comma is a control.

    Returns:
        The bytes of a PNG. None: nothing costs anything.
    """
    rows: dict[str, dict[str, list[Cost]]] = {}
    for panel, found in points.items():
        for name, flops, sent, value in found:
            for amount, x in (("FLOPs a question", flops), ("bytes sent a question", sent)):
                if x > 0:
                    cost = Cost(name, x, *value, control=", " in name)
                    rows.setdefault(amount, {}).setdefault(panel, []).append(cost)
    return costs(rows, label="%, with 95 % intervals") if rows else None


def palette(points: Sequence[Cost]) -> dict[str, str]:
    """Gives every protocol its own colour, and all controls grey.

    Args:
        points: The points.

    Returns:
        The colours, by name.
    """
    names = dict.fromkeys(point.name for point in points if not point.control)
    colours = itertools.cycle(f"C{i}" for i in (0, 1, 2, 3, 4, 5, 6, 8, 9))  # C7 is grey
    return dict(zip(names, colours, strict=False)) | {point.name: "0.6" for point in points if point.control}


def draw_costs(axis: Axes, points: Sequence[Cost], colours: Mapping[str, str]) -> None:
    """Draws points with their intervals. Accuracy is in %; costs are on a logarithmic axis.

    Args:
        axis: The axes to draw on.
        points: The points.
        colours: Their colours, by name (`palette`).
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    for point in points:
        colour = colours[point.name]
        bar = [[100 * (point.value - point.low)], [100 * (point.high - point.value)]]
        how: dict[str, Any] = dict(markersize=6, linewidth=1.2, capsize=3, zorder=2 if point.control else 3)
        axis.errorbar(point.amount, 100 * point.value, bar, fmt="o", color=colour, **how)
    amounts = [point.amount for point in points]
    span = max(max(amounts) / min(amounts), 4)
    axis.set_xscale("log")
    axis.set(xlim=(min(amounts) / span**0.3, max(amounts) * span**0.3), ylim=(-14, 114), yticks=range(0, 101, 20))
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1,)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)


def name_points(axis: Axes, points: Sequence[Cost]) -> np.ndarray:
    """Writes a label beside every point. A line connects a label to its point if they are far apart.

    A place is free if the label and its line cover no point, no interval and no other label or line, and if no other
    point is nearer. The nearest free place is used. If no place is free, the one that covers least is used.

    Args:
        axis: The axes. Their layout must be final, since space is measured in pixels.
        points: The points.

    Returns:
        Boxes of the labels in pixels: [points, 4] for left, bottom, right and top.
    """
    figure, inside = axis.get_figure(root=True), np.array([axis.get_window_extent().extents])
    assert figure is not None
    at = lambda shares: axis.transData.transform([(p.amount, 100 * x) for p, x in zip(points, shares, strict=True)])
    centres = at([p.value for p in points])
    wide, bottoms, tops = np.array([7, 3]), at([p.low for p in points]), at([p.high for p in points])
    taken = np.vstack([np.hstack([centres - 9, centres + 9]), np.hstack([bottoms - wide, tops + wide])])
    angles = np.deg2rad([0, 180, 35, -35, 145, -145, 65, -65, 115, -115, 90, -90])
    places = [(r * np.cos(a), r * np.sin(a)) for r in (11, 20, 32, 46, 62, 80, 100, 124) for a in angles]
    labels = np.empty((len(points), 4))
    for n in sorted(range(len(points)), key=lambda n: points[n].control):
        p = points[n]
        measured = axis.text(0, 0, p.name, fontsize="small", parse_math=False)
        width, height = measured.get_window_extent().size
        measured.remove()

        def boxes(place: tuple[float, float], centre=centres[n], width=width, height=height) -> np.ndarray:
            """The boxes of the label, and of pieces of its line."""
            x, y = end = centre + np.multiply(place, figure.dpi / 72)
            left = x if place[0] > 1 else x - width if place[0] < -1 else x - width / 2
            pieces = np.linspace((centre + end) / 2, end, 12 if np.hypot(*place) > 12 else 0)
            label = [left, y - height / 2, left + width, y + height / 2]
            return np.vstack([label, np.hstack([pieces - 2, pieces + 2])])

        def cost(place: tuple[float, float], n=n, boxes=boxes, taken=taken, area=width * height) -> float:
            own = boxes(place)
            away = np.hypot(*(centres - np.clip(centres, own[0, :2], own[0, 2:])).T)
            outside = area - common(own[:1], inside)
            return round(common(own, taken) + outside + 1000 * (away[n] > away.min() + 9), 3)

        best = min(places, key=cost)
        labels[n] = boxes(best)[0]
        taken = np.vstack([taken, boxes(best)])
        side, edge = ("left", 0) if best[0] > 1 else ("right", 1) if best[0] < -1 else ("center", 0.5)
        line = dict(arrowstyle="-", color="0.6", linewidth=0.7, shrinkA=0, shrinkB=4, relpos=(edge, 0.5))
        axis.annotate(
            p.name, (p.amount, 100 * p.value), best, textcoords="offset points", ha=side, va="center", fontsize="small",
            color="0.4" if p.control else "black", arrowprops=line if np.hypot(*best) > 12 else None, parse_math=False,
        )  # fmt: skip
    return labels


def common(some: np.ndarray, others: np.ndarray) -> float:
    """Computes the overlapping area of boxes, summed over all pairs.

    Args:
        some: Boxes [n, 4]: left, bottom, right, top.
        others: Boxes [m, 4].

    Returns:
        The area.
    """
    low, high = np.maximum(some[:, None, :2], others[:, :2]), np.minimum(some[:, None, 2:], others[:, 2:])
    return float(np.maximum(high - low, 0).prod(axis=-1).sum())
