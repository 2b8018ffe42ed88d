"""Pictures of results."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np


def layer_maps(maps: Mapping[str, tuple[np.ndarray, int, int]], columns: int) -> bytes:
    """Accuracy over (k, j) as a PNG, `columns` maps in a row; the chosen cell is framed.

    maps[title] = accuracy [K, J] in 0 .. 1 for k = 1 .. K (up) and j = 1 .. J (right), and the chosen k and j.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    rows = len(maps) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 4.1 * rows), squeeze=False, layout="constrained")
    scale = ScalarMappable(Normalize(0, 100), "viridis")
    for axis, (title, (accuracies, best_k, best_j)) in zip(axes.flat, maps.items(), strict=True):
        cells = 100 * accuracies
        K, J = cells.shape
        axis.imshow(
            cells,
            origin="lower",
            cmap=scale.cmap,
            norm=scale.norm,
            extent=(0.5, J + 0.5, 0.5, K + 0.5),
            aspect="auto",
        )
        for k, j in np.ndindex(K, J):
            axis.text(
                j + 1,
                k + 1,
                f"{cells[k, j]:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if cells[k, j] < 60 else "black",
            )
        axis.add_patch(Rectangle((best_j - 0.5, best_k - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
        axis.set(
            title=title,
            xlabel="j: layer of B after which it is grafted in",
            ylabel="k: layer of A that is sent",
        )
        axis.set_xticks(range(1, J + 1))
        axis.set_yticks(range(1, K + 1))
    figure.colorbar(scale, ax=axes, label="exact match, %")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    plt.close(figure)
    return png.getvalue()
