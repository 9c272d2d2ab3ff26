"""A predictor of quality from choices: evaluated points teach what others would have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor

_HELD_OUT = 0.2  # of the points, that tell how good the predictor is
_MEMBERS = 3  # networks, whose mean is the prediction


class Predictor(NamedTuple):
    """What was learned of evaluated points.

    Attributes:
      predict: choices [n, decisions] -> qualities [n].
      rank_correlation: Spearman's, of a predictor of four fifths of the points on the other fifth.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    rank_correlation: float


def fit_predictor(
    choices: np.ndarray,
    qualities: np.ndarray,
    mask: np.ndarray,
    active: Callable[[np.ndarray], np.ndarray],
    seed: int,
) -> Predictor:
    """Learns qualities from one-hot choices by small neural networks.

    Three layers of 400 units (Cai et al. 2020, arXiv 1908.09791), the mean of three networks.
    Choices about what a point has not are left out: they make no difference to it.

    Args:
      choices: [n, decisions], int.
      qualities: [n]; those that are not finite are left out.
      mask: [decisions, max_options], bool.
      active: choices [n, decisions] -> which decisions decide anything: bool [n, decisions].
      seed: of the networks and of what is held out.

    Raises:
      ValueError: fewer than 10 points with a finite quality.
    """
    known = np.isfinite(qualities)
    choices, qualities = choices[known], qualities[known]
    if len(choices) < 10:
        raise ValueError(f"A predictor learns from at least 10 points; got {len(choices)}.")
    genes = _genes(choices, mask, active(choices))
    order = np.random.default_rng(seed).permutation(len(choices))
    apart = max(2, round(_HELD_OUT * len(choices)))
    judge = _fitted(genes[order[apart:]], qualities[order[apart:]], seed)
    correlation = spearmanr(judge(genes[order[:apart]]), qualities[order[:apart]]).statistic
    whole = _fitted(genes, qualities, seed)
    return Predictor(lambda points: whole(_genes(points, mask, active(points))), float(correlation))


def _genes(choices: np.ndarray, mask: np.ndarray, active: np.ndarray) -> np.ndarray:
    """[n, options]: 1 at every option taken by a decision that decides."""
    one_hot = choices[:, :, None] == np.arange(mask.shape[1])
    return (one_hot & active[:, :, None])[:, mask].astype(np.float64)


def _fitted(genes: np.ndarray, qualities: np.ndarray, seed: int) -> Callable:
    mean, scale = qualities.mean(), qualities.std() or 1.0
    members = [
        MLPRegressor(
            hidden_layer_sizes=(400, 400, 400),
            alpha=1e-3,
            max_iter=200,
            tol=1e-5,
            random_state=seed + n,
        )
        for n in range(_MEMBERS)
    ]
    targets = (qualities - mean) / scale
    for member in members:
        with warnings.catch_warnings():  # its last iteration is as good as any
            warnings.simplefilter("ignore", ConvergenceWarning)
            member.fit(genes, targets)
    return lambda own: mean + scale * np.mean([m.predict(own) for m in members], axis=0)
