"""Points of a space that searchers start from, and the distribution tilted towards a cost."""

from __future__ import annotations

import numpy as np

from aqt_search.search.cost_table import CostTable

_LARGEST_TILT = 1e4  # shares of cost below a ten thousandth of the target may stay unsorted
_BISECTIONS = 40  # of an interval of 2e4: to 2e-8


def single_changes(point: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`point` [decisions] with decision d set to option o: [decisions, max_options, decisions].

    Where `mask` [decisions, max_options] says that there is no such option, it is `point` itself.
    """
    changed = np.tile(point, (*mask.shape, 1))
    decision, option = np.nonzero(mask)
    changed[decision, option, decision] = option
    return changed


def option_costs(costs: CostTable) -> np.ndarray:
    """Cost of the dearest point with one option changed: float64 [decisions, max_options]."""
    changed = single_changes(costs.dearest, costs.mask)
    return costs.of_many(changed.reshape(-1, changed.shape[-1])).reshape(costs.mask.shape)


def tilted_log_probabilities(costs: CostTable, target: float) -> np.ndarray:
    """Independent categoricals whose mean cost is the target: float64 [decisions, max_options].

        p(o | d) = exp(-lambda * c[d, o] / target) / sum over o' of exp(-lambda * c[d, o'] / target)

    with c of `option_costs`, and lambda by bisection such that the expected cost is the target; of
    all independent distributions with that mean of an additive cost, the one of largest entropy
    (Jaynes 1957, "Information theory and statistical mechanics"). Where an option does not exist,
    -inf. At either end of the space's costs lambda stays finite, and the mean is only close.
    """
    shares = option_costs(costs) / target

    def log_p(tilt: float) -> np.ndarray:
        logits = np.where(costs.mask, -tilt * shares, -np.inf)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    low, high = -_LARGEST_TILT, _LARGEST_TILT
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = costs.known_expected(np.exp(log_p(middle))) > target
        low, high = (middle, high) if above else (low, middle)
    return log_p((low + high) / 2)


def distinct(points: np.ndarray) -> np.ndarray:
    """Every row of [n, decisions] once, in the order of first appearance."""
    _, first = np.unique(points, axis=0, return_index=True)
    return points[np.sort(first)]


def sample_points(rng: np.random.Generator, log_p: np.ndarray, count: int) -> np.ndarray:
    """`count` independent points from log_p [decisions, max_options]: [count, decisions], int."""
    noise = rng.gumbel(size=(count, *log_p.shape))  # the argmax of log p + Gumbel noise has law p
    return np.argmax(log_p + noise, axis=-1)
