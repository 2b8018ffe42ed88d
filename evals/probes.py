"""Linear probes: ridge regression on standardised features, in closed form."""

from __future__ import annotations

import numpy as np


def solve(x: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Fits ridge regression on standardised features. Uses the dual form, because there are fewer rows than features.

    Args:
        x: Features [n, D].
        y: One target [n], or several [n, S].
        ridge: Penalty, for each feature.

    Returns:
        Weights [D] or [D, S], and the bias of each target.
    """
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale == 0, 1, scale)
    z = (x - mean) / scale
    dual = np.linalg.solve(z @ z.T + ridge * x.shape[1] * np.eye(len(x)), y - y.mean(axis=0))
    weight = (z / scale).T @ dual
    return weight, y.mean(axis=0) - mean @ weight
