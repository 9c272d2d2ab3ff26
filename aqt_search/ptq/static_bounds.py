"""Static bounds: every scale fixed by calibration data, before any value is moved onto a grid.

    assignment, state = calibrate(apply, assignment, variables, batches)
    qfun = quantize_with_state(apply)
    logits = qfun.evaluate(assignment, state, variables, x)              # the quantized model
    frozen = freeze(apply, assignment, variables, x, state=state)        # what is served

The bounds of weights are those of the weights calibrated. A later step that moves weights onto the
grid of these bounds leaves them exactly there: their codes, quantized again, are the same.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.calibration import History, frozen_after
from aqt_search.numerics.granularity import PER_CHANNEL, PER_TOKEN
from aqt_search.numerics.quantizer import quantizer
from aqt_search.ptq.captures import reachable_sites, site_values
from aqt_search.ptq.errors import PTQError, SkippedSite
from aqt_search.tracing import static_leaves
from aqt_search.tracing.layers import split_layer, stack_of
from aqt_search.tracing.sites import SIDES, Site, SiteFormats
from aqt_search.tracing.transform import (
    Assignment,
    CalibrationState,
    check_assignment,
    find_sites,
    quantize_with_state,
    with_static_activations,
)


def check_batches(batches: Sequence[Any]) -> None:
    """Raises PTQError unless there is a batch, and an example in each: the least that is data."""
    if not hasattr(batches, "__len__") or isinstance(batches, (jax.Array, np.ndarray)):
        raise PTQError(
            "Calibration data is a sequence of batches, read more than once; got"
            f" {type(batches).__name__}. Make it a list."
        )
    if not len(batches):
        raise PTQError("There is no calibration data: expected at least one batch, got none.")
    for number, batch in enumerate(batches):
        if any(0 in np.shape(leaf) for leaf in jax.tree.leaves(batch)):
            shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
            raise PTQError(f"Batch {number} of the calibration data is empty: shape {shapes}.")


def static_assignment(assignment: Assignment, sites: Mapping[str, Site]) -> dict[str, SiteFormats]:
    """The assignment with calibrations that all have state, so that `state` holds every bound.

    Bounds of activations are averaged over all batches seen (`with_static_activations`); those of
    weights and constants stay as of the first look. Calibrations with state stay as they are, and
    so do those of tables of lookups and of activations under `PER_TOKEN`, which can have none.

    Raises:
      SiteError: the assignment is not of these sites.
    """
    check_assignment(assignment, sites)
    assignment = with_static_activations(assignment, sites)

    def of(name: str, side: str, spec):
        if spec is None or stack_of(name, sites).kind == "gather":
            return spec
        q = quantizer(spec)
        if q.calibration.read is not None:
            return q
        if q.granularity == PER_TOKEN:
            if getattr(sites[name], side).role == "activation":
                return q
            q = dataclasses.replace(q, granularity=PER_CHANNEL)  # the same axes, of a known length
        return dataclasses.replace(q, calibration=frozen_after(q.calibration, 1))

    return {
        name: formats._replace(**{s: of(name, s, getattr(formats, s)) for s in SIDES})
        for name, formats in assignment.items()
    }


def calibrate(
    apply: Callable, assignment: Assignment, variables: Any, batches: Sequence[Any]
) -> tuple[dict[str, SiteFormats], CalibrationState]:
    """Static bounds of all operands: one pass over the batches, each a call of the quantized model.

    An operand that is zero in all batches says nothing of its range. It keeps the calibration that
    it came with, which looks at each batch anew, under the warning `SkippedSite`.

    Args:
      apply: `apply(variables, batch) -> outputs`.
      assignment: formats by site; any calibration, format and granularity.
      variables: the first argument of `apply`.
      batches: calibration data; batches of equal shape are compiled once.

    Returns:
      The assignment whose calibrations have state (`static_assignment`), and their state.

    Raises:
      PTQError: no data, an empty batch, or an operand that is not finite; the message names its
        site. An operand that is all zero, where the calibration it came with has state.
      SiteError: the assignment is not of this function, or a site is in a while loop.
      ValueError: blocks that a calibration cannot fill; see `Quantizer`.
    """
    check_batches(batches)
    sites = find_sites(apply, variables, batches[0])
    static = static_assignment(assignment, sites)
    state = quantize_with_state(apply).init(static, variables, batches[0])
    formats, observe = jax.tree.map(jnp.asarray, static), _observer(apply)
    for batch in batches:
        state = observe(formats, state, variables, batch)
    silent = list(_uninformed(sites, static, jax.device_get(state), len(batches)))
    if silent:
        _check_finite(apply, variables, batches, {name for name, _, _ in silent})
    never = [s for s in silent if s[2]]
    return _without_silent(sites, assignment, static, state, never)


# The program is kept by the function: formats are data, and so one serves all that look alike.
@functools.lru_cache(maxsize=8)
def _observer(apply: Callable) -> Callable:
    """`observe(assignment, state, variables, batch)`: the state after a batch."""
    qfun = quantize_with_state(apply)
    # Of the outputs alone none is asked for: what lies behind the last site is not computed.
    return static_leaves.jit(lambda *arguments: qfun.apply(*arguments)[1])


def _uninformed(
    sites: Mapping[str, Site], static: Assignment, state: CalibrationState, count: int
) -> Iterator[tuple[str, str, bool]]:
    """Operands of which some batch told nothing: (site, side, whether none told anything)."""
    for name, fields in state.items():
        for side, history in fields.items():
            if not isinstance(history, History):
                continue  # a calibration of another kind, with rules of its own
            averaged = getattr(sites[name], side).role == "activation"
            if np.any(history.updates < (count if averaged else 1)):
                yield name, side, bool(np.any(history.updates == 0))


def _check_finite(apply: Callable, variables: Any, batches: Sequence[Any], names: set[str]) -> None:
    """Raises PTQError for an operand of these sites that is not finite in the float model."""
    _, out_of_reach = reachable_sites(apply, variables, batches[0])
    reached = [name for name in names if name not in out_of_reach]
    values = site_values(apply, reached)

    @static_leaves.jit
    def finite(variables, x):
        found = values({}, {}, variables, x)
        return {
            (name, side): jnp.all(jnp.isfinite(getattr(found[name], side)))
            for name in reached
            for side in SIDES
        }

    for number, batch in enumerate(batches):
        for (name, side), is_finite in finite(variables, batch).items():
            if not is_finite:
                raise PTQError(
                    f"Site {name!r}: its {side} is not finite in batch {number} of the calibration"
                    " data. Look for NaN or infinity in the data and the variables."
                )


def _without_silent(
    sites: Mapping[str, Site], assignment: Assignment, static: Assignment,
    state: CalibrationState, silent: Sequence,
) -> tuple[dict[str, SiteFormats], CalibrationState]:  # fmt: skip
    """Gives operands that were zero throughout the calibration back that they came with."""
    static, state = dict(static), {name: dict(fields) for name, fields in state.items()}
    for name, side, _ in silent:
        layers = [n for n in static if split_layer(n, sites)[0] == name]
        given = [n for n in layers if getattr(assignment[n], side) is not None]
        own = quantizer(getattr(assignment[given[0]], side))
        reason = f"Site {name!r}: its {side} is zero in all of the calibration data"
        if own.calibration.read is not None:
            raise PTQError(
                f"{reason}, so its calibration has no bounds. Give data that reaches it."
            )
        warnings.warn(
            f"{reason}; it gets no static bounds, but a scale for each batch.",
            SkippedSite,
            stacklevel=3,
        )
        for layer in given:
            spec = quantizer(getattr(assignment[layer], side))
            static[layer] = static[layer]._replace(**{side: spec})
        del state[name][side]
    return static, {name: fields for name, fields in state.items() if fields}
