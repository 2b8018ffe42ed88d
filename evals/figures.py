"""Pictures of sweeps over the layers: contour maps as a PNG, heat maps to point at as a page of HTML."""

from __future__ import annotations

import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from plotly.graph_objects import Figure

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
    """A value at every (k, j) of a sweep.

    values: [K, J], finite.  ks, js: the layers of A [K] and of B [J], ascending.  best: the (k, j) that is marked.
    """

    title: str
    values: np.ndarray
    ks: Sequence[int]
    js: Sequence[int]
    best: tuple[int, int]

    @property
    def best_value(self) -> float:
        k, j = self.best
        return float(self.values[self.ks.index(k), self.js.index(j)])


def span(maps: Sequence[LayerMap]) -> tuple[float, float]:
    """The least and the greatest value of all maps; of equal values, half below and half above them."""
    low, high = float(min(m.values.min() for m in maps)), float(max(m.values.max() for m in maps))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def edges(layers: Sequence[int]) -> np.ndarray:
    """Where the cells of layers [N] end [N + 1]: halfway between neighbours, half a layer beyond the first and last."""
    middles = np.add(layers[1:], layers[:-1]) / 2
    return np.concatenate([[layers[0] - 0.5], middles, [layers[-1] + 0.5]])


def ticks(layers: Sequence[int]) -> list[int]:
    """At most twelve of the layers."""
    return list(layers[:: -(-len(layers) // 12)])


def inward(layers: Sequence[int], layer: int) -> int:
    """+1 or -1: the direction from a layer in which the map is wider, where a label is not cut off."""
    return 1 if 2 * layer <= layers[0] + layers[-1] else -1


def contours(maps: Sequence[LayerMap], *, label: str, columns: int, limits: tuple[float, float] | None = None) -> bytes:
    """Filled contour maps as in Figure 2 of Ramesh & Li (2025) as a PNG, `columns` in a row, the best cell starred.

    One colour bar serves all; `limits` are its ends, by default the least and the greatest value of all.
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
        draw(axis, layer_map, norm, levels)
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label=label, ticks=levels)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    plt.close(figure)
    return png.getvalue()


def draw(axis: Axes, layer_map: LayerMap, norm: Normalize, levels: np.ndarray) -> None:
    """One map with its star: contours, or cells where a single k or j leaves nothing to draw contours between."""
    ks, js, (k, j) = layer_map.ks, layer_map.js, layer_map.best
    if min(layer_map.values.shape) > 1:
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


def page(title: str, groups: Mapping[str, tuple[str, Sequence[LayerMap]]], text: str) -> str:
    """One page of HTML that needs no network: `text` as it stands, then the maps of every group side by side.

    groups[heading] = the colour bar's label and the maps that share it. Pointing at a cell shows its k, j and value.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(text)}</pre>"]
    for index, (heading, (label, maps)) in enumerate(groups.items()):
        # A name for every div: plotly's own are random. The script is 5 MB, so only the first figure brings it. Its
        # tool bar would cover the titles.
        figure = heat_maps(label, maps).to_html(
            full_html=False,
            include_plotlyjs=index == 0,
            div_id=f"group-{index}",
            config={"displayModeBar": False},
        )
        parts += [f"<h2>{html.escape(heading)}</h2>", figure]
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
{body}
</body>
</html>
"""


def heat_maps(label: str, maps: Sequence[LayerMap]) -> Figure:
    """Interactive heat maps in rows of three, the best cells starred; one colour bar serves all."""
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
    """Plain text as plotly, which reads tags in titles, shows it unchanged."""
    return html.escape(text, quote=False).replace("\n", "<br>")
