"""Pictures of results."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np


def layer_maps(
    maps: Mapping[str, Mapping[str, np.ndarray]], chosen: Mapping[str, Mapping[str, tuple[int, int]]]
) -> bytes:
    """Accuracy over (k, j) as a PNG: one row per pair of models, one column per game; the chosen cell is framed.

    maps[pair][game] is [K, J] in 0 .. 1 for k = 1 .. K (up) and j = 1 .. J (right); chosen[pair][game] = (k, j).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    games = list(next(iter(maps.values())))
    figure, axes = plt.subplots(
        len(maps), len(games), figsize=(4.6 * len(games), 3.9 * len(maps)), squeeze=False, layout="constrained"
    )
    scale = ScalarMappable(Normalize(0, 100), "viridis")
    for row, (pair, by_game) in zip(axes, maps.items(), strict=True):
        for axis, game in zip(row, games, strict=True):
            cells = 100 * by_game[game]
            rows, columns = cells.shape
            axis.imshow(
                cells,
                origin="lower",
                cmap=scale.cmap,
                norm=scale.norm,
                extent=(0.5, columns + 0.5, 0.5, rows + 0.5),
                aspect="auto",
            )
            for k, j in np.ndindex(rows, columns):
                axis.text(
                    j + 1,
                    k + 1,
                    f"{cells[k, j]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if cells[k, j] < 60 else "black",
                )
            k, j = chosen[pair][game]
            axis.add_patch(Rectangle((j - 0.5, k - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
            axis.set(
                title=f"{game.replace('_', ' ')}, {pair}",
                xlabel="j: layer of B after which it is grafted in",
                ylabel="k: layer of A that is sent",
            )
            axis.set_xticks(range(1, columns + 1))
            axis.set_yticks(range(1, rows + 1))
    figure.colorbar(scale, ax=axes, label="exact match, %")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    plt.close(figure)
    return png.getvalue()
