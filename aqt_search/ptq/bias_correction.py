"""Bias correction: takes out the shift of every output channel's mean that quantization causes.

Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, in its empirical form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.ptq.captures import site_values
from aqt_search.ptq.dataflow import SiteFlow, Tail, dataflow, why_not_changeable
from aqt_search.ptq.errors import PTQError
from aqt_search.ptq.rewriting import Rewriting, warn_skipped
from aqt_search.ptq.static_bounds import check_batches
from aqt_search.ptq.unrolling import unroll
from aqt_search.tracing import static_leaves
from aqt_search.tracing.sites import is_unquantized
from aqt_search.tracing.transform import Assignment, CalibrationState

_FEWEST_VALUES = 2  # of an output channel, over all batches


def correct_bias(
    apply: Callable,
    assignment: Assignment,
    state: CalibrationState,
    variables: Any,
    batches: Sequence[Any],
) -> Any:
    """Gives the products of quantized sites the mean per output channel that they have in float.

        bias' = bias + E[float product] - E[quantized product]

    Sites are visited in program order, with those before them quantized and corrected; the means
    are over the batches and all positions. What takes the difference is the first additive
    parameter behind the product: its bias, or BatchNorm's mean, with a minus. A site without one
    stays, with a `SkippedSite` warning.

    The layers of a scan are sites of their own.

    The whole model runs over the batches once for every site, in one compiled function.

    Args:
      apply: `apply(variables, batch) -> outputs`, in evaluation mode.
      assignment, state: as `static_bounds.calibrate` returns them.
      variables: the first argument of `apply`, concrete.
      batches: calibration data; batches of equal shape are compiled once.

    Returns:
      Variables of the same tree, shapes and dtypes.

    Raises:
      PTQError: no data, fewer than 2 values of an output channel, or values that are not finite.
      SiteError: the assignment or the state is not of this function.
    """
    check_batches(batches)
    given, model = variables, unroll(apply, variables, batches[0])
    if model is not None:
        apply, variables = model.apply, model.variables
        assignment, state = model.assignment(assignment), model.state(state)
    served = _served(dataflow(apply, variables, batches[0]), assignment)
    if not served:
        return given
    means = _channel_means(apply, {name: tail.product_axis for name, tail in served.items()})
    target = _average(static_leaves.jit(lambda v, x: means({}, {}, v, x)), variables, batches)
    quantized = static_leaves.jit(lambda v, x: means(assignment, state, v, x))
    for name, tail in served.items():
        delta = target[name] - _average(quantized, variables, batches)[name]
        if not np.isfinite(delta).all():
            raise PTQError(f"Site {name!r}: the mean of its product is not finite on these data.")
        rewriting = Rewriting(variables)
        rewriting.add_to_product(tail, delta)
        variables = rewriting.variables()
    return variables if model is None else model.restacked(variables)


def _served(flows: Mapping[str, SiteFlow], assignment: Assignment) -> dict[str, Tail]:
    """The tails of the quantized sites that can be corrected, in program order."""
    for name in assignment:
        if name not in flows and not is_unquantized(assignment[name]):
            warn_skipped("correct_bias", name, "it is no product with a weight")
    served = {}
    for name, flow in flows.items():
        if name not in assignment or is_unquantized(assignment[name]):
            continue
        reason = why_not_correctable(flow)
        if reason:
            warn_skipped("correct_bias", name, reason)
        else:
            assert flow.tail is not None  # else there were a reason
            served[name] = flow.tail
    return served


def why_not_correctable(flow: SiteFlow) -> str | None:
    """Why nothing can be added to the product of a site."""
    if flow.tail is None or flow.tail.refused:
        return why_not_changeable(flow)
    return None if flow.tail.shifts else "no bias or mean is added to its product"


def _channel_means(apply: Callable, axes: Mapping[str, int]) -> Callable:
    """`means(assignment, state, variables, batch)`: {name: (mean [channels], number of values)}."""
    values = site_values(apply, list(axes))

    def means(assignment, state, variables, batch):
        found = values(assignment, state, variables, batch)
        return {name: _mean(found[name].out, axis) for name, axis in axes.items()}

    return means


def _mean(product: jax.Array, axis: int) -> tuple[jax.Array, int]:
    others = tuple(a for a in range(product.ndim) if a != axis)
    return jnp.mean(product.astype(jnp.float32), others), product.size // product.shape[axis]


def _average(means: Callable, variables: Any, batches: Sequence[Any]) -> dict[str, np.ndarray]:
    """Means over all batches, each counted with its number of values: float64, [channels]."""
    found = jax.device_get([means(variables, batch) for batch in batches])
    averages = {}
    for name in found[0]:
        counts = [batch[name][1] for batch in found]
        if sum(counts) < _FEWEST_VALUES:
            raise PTQError(
                f"Site {name!r}: the calibration data have {sum(counts)} value of each output"
                f" channel; its mean takes at least {_FEWEST_VALUES}. Give more examples."
            )
        rows = [np.asarray(batch[name][0], np.float64) for batch in found]
        averages[name] = np.average(rows, axis=0, weights=counts)
    return averages
