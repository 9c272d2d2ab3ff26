"""Layer-wise reconstruction: weights rounded so that each layer's output stays what it was.

Site by site in program order, x is what enters the site in the quantized model whose earlier
weights are rounded already, and y what the site gives in the float model. The error of a rounding
W~ of the weight W is quadratic in dW = W - W~, so that the data is needed once and no more:

    E |y - W~ x|^2 = E |r|^2 + 2 tr(dW E[x r^T]) + tr(dW E[x x^T] dW^T),   r = y - W x

It is exact, without the noise of mini-batches, and a layer is solved by products of small matrices
instead of convolutions. AdaRound (arXiv 2004.10568, equation 21) and GPTQ (arXiv 2210.17323,
equation 1) minimise it, each in its own way.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.formats import Grid, round_to_grid
from aqt_search.numerics.granularity import join_blocks, split_blocks
from aqt_search.numerics.quantized import calibrated, carrier_dtype, in_one_format
from aqt_search.numerics.scale import scale_of
from aqt_search.products.operands import values_of
from aqt_search.ptq.captures import (
    SiteValues,
    check_site_names,
    equations_to,
    site_values,
    why_out_of_reach,
)
from aqt_search.ptq.errors import PTQError, SkippedSite
from aqt_search.ptq.product_matrix import NoMatrix, ProductMatrix, product_matrix
from aqt_search.ptq.static_bounds import check_batches
from aqt_search.ptq.unrolling import unroll
from aqt_search.ptq.weight_leaves import NoLeaf, WeightLeaf, weight_leaf
from aqt_search.tracing import static_leaves
from aqt_search.tracing.plans import Plan, make_plans
from aqt_search.tracing.sites import SIDES
from aqt_search.tracing.trace import Trace, trace_function
from aqt_search.tracing.transform import (
    Assignment,
    CalibrationState,
    check_assignment,
    checked_state,
)

_PRECISE = jax.lax.Precision.HIGHEST
_ON_GRID = 1e-4  # of a step: nearer than this a value counts as a grid point


class Moments(NamedTuple):
    """What the error of a layer needs to know of the data: sums over rows x, or their means."""

    second: jax.Array  # [groups, patch, patch]: E[x x^T]
    slope: jax.Array  # [groups, outputs, patch]: E[r x^T]; 0 for a symmetric reconstruction
    constant: jax.Array  # [groups, outputs]: E[r^2]
    rows: jax.Array  # []: how many there are

    def means(self) -> Moments:
        """The means of what are sums."""
        rows = self.rows
        return Moments(self.second / rows, self.slope / rows, self.constant / rows, rows)

    def error(self, change: jax.Array) -> jax.Array:
        """[groups, outputs]: E (y - W~ x)^2 of each output, for change = W - W~."""
        return self.constant + self.excess(change)

    def excess(self, change: jax.Array) -> jax.Array:
        """[groups, outputs]: what the change adds to the error."""
        curved = jnp.matmul(change, self.second, precision=_PRECISE) + 2 * self.slope
        return jnp.sum(change * curved, axis=-1)

    def slope_of_error(self, change: jax.Array) -> jax.Array:
        """[groups, outputs, patch]: the derivative of the error in the change."""
        return 2 * (jnp.matmul(change, self.second, precision=_PRECISE) + self.slope)


class StaticGrid(NamedTuple):
    """The values that static bounds leave to a weight: (code - zero_point) * scale."""

    grid: Grid  # of the codes; scalars
    scale: jax.Array  # [groups, outputs, patch]
    zero_point: jax.Array  # the same

    def nearest(self, weight: jax.Array) -> jax.Array:
        """What evaluation makes of a weight."""
        return self._values(round_to_grid(self._steps(weight), self.grid))

    def neighbours(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The grid values below and above each element; equal on the grid and outside of it."""
        steps = self._steps(weight)
        mirrored = self.grid._replace(
            min_value=-self.grid.max_value, max_value=-self.grid.min_value
        )
        nearest = round_to_grid(steps, self.grid)
        low = round_to_grid(steps, self.grid, "floor")
        high = -round_to_grid(-steps, mirrored, "floor")
        on_grid = jnp.abs(steps - nearest) <= _ON_GRID * (high - low)
        low, high = (jnp.where(on_grid, nearest, v) for v in (low, high))
        return self._values(low), self._values(high)

    def _steps(self, weight: jax.Array) -> jax.Array:
        return weight * (1 / self.scale) + self.zero_point

    def _values(self, codes: jax.Array) -> jax.Array:
        return (codes - self.zero_point) * self.scale


class Layer(NamedTuple):
    """A site whose weight can be rounded."""

    name: str
    side: int  # of the weight: 0 for lhs, 1 for rhs
    matrix: ProductMatrix
    leaf: WeightLeaf


# (weight [groups, outputs, patch], grid, means of the moments) -> the weight rounded
Solve = Callable[[jax.Array, StaticGrid, Moments], jax.Array]


def reconstruct(
    apply: Callable,
    assignment: Assignment,
    state: CalibrationState,
    variables: Any,
    batches: Sequence[Any],
    solve: Solve,
    *,
    names: Sequence[str] | None = None,
    asymmetric: bool = True,
) -> Any:
    """Variables whose weights at the sites are rounded by `solve`, one site after another.

    The layers of a scan are sites, too, each with the inputs that it has under those before it.

    Args:
      apply, assignment, state, variables, batches: as `calibrate` took and returned them; batches
        of one shape are compiled once for each site, and their moments added up.
      solve: a jitted function. Of what it returns an output channel is taken where its error is
        below that of the nearest grid values, which stand otherwise.
      names: of sites, or of layers of stacks; None for all whose weight has a format.
      asymmetric: whether y is of the float model (else y = W x, errors before the site are not
        made up for).

    Raises:
      PTQError: no data, unknown names, a weight without static bounds, values that are not finite.
      SiteError: the assignment or the state is not of this function.
    """
    check_batches(batches)
    trace = trace_function(apply, variables, (batches[0],), {}, {})
    check_assignment(assignment, trace.sites)
    plans = make_plans(trace, assignment, None)
    held = checked_state(state, trace, plans)
    model = unroll(apply, variables, batches[0])
    if model is not None:  # each layer of a stack is a site of its own, after those before it
        check_site_names(model.names(names) or (), model.sources)
        apply, variables, names = model.apply, model.variables, model.names(names)
        assignment, state = model.assignment(assignment), model.state(state)
        trace = trace_function(apply, variables, (batches[0],), {}, {})
        plans = make_plans(trace, assignment, None)
        held = checked_state(state, trace, plans)
    rounded = variables
    for layer in _layers(trace, assignment, names):
        key = (layer.name, SIDES[layer.side])
        weight = layer.leaf.read(variables)
        if not np.any(weight):
            _skip(layer.name, "its weight is zero")
            continue
        if key not in held:
            raise PTQError(
                f"Site {layer.name!r}: its weight has no static bounds. Pass the assignment and the"
                " state that aqt_search.ptq.calibrate returns."
            )
        of_batch = _moments_of_batch(apply, assignment, layer, asymmetric)
        total = functools.reduce(
            _sum, (of_batch(state, variables, rounded, batch) for batch in batches)
        )
        if not all(np.all(np.isfinite(leaf)) for leaf in (weight, *total)):
            raise PTQError(
                f"Site {layer.name!r}: its weight, its inputs or its outputs are not finite. Look"
                " for NaN or infinity in the calibration data and the variables."
            )
        found = _round(solve, layer.matrix, plans[key], held[key], weight, total)
        rounded = layer.leaf.write(rounded, found)
    return rounded if model is None else model.restacked(rounded)


def _layers(trace: Trace, assignment: Assignment, names: Sequence[str] | None) -> Iterator[Layer]:
    """The sites to round, in program order; warns of those that cannot be."""
    check_site_names(names or (), trace.sites)
    for name, site in trace.sites.items():
        roles = (site.lhs.role, site.rhs.role)
        side = 0 if roles == ("weight", "activation") else 1
        formats = assignment.get(name)
        quantized = roles[side] == "weight" and formats is not None and formats[side] is not None
        if not (quantized if names is None else name in names):
            continue
        try:
            if not quantized:
                raise NoLeaf("it has no weight with a format")
            yield _layer(trace, name, side)
        except (NoLeaf, NoMatrix) as reason:
            _skip(name, str(reason))


def _layer(trace: Trace, name: str, side: int) -> Layer:
    if reason := why_out_of_reach(trace, name):
        raise NoLeaf(reason)
    if trace.sites[name].kind == "gather":
        raise NoLeaf("it looks up rows of its weight, and nothing is summed")
    leaf = weight_leaf(trace, name, SIDES[side])
    *_, (_, eqn) = equations_to(trace, name)
    return Layer(name, side, product_matrix(eqn, side), leaf)


def _skip(name: str, reason: str) -> None:
    warnings.warn(f"Site {name!r} is left as it is: {reason}.", SkippedSite, stacklevel=5)


def _moments_of_batch(
    apply: Callable, assignment: Assignment, layer: Layer, asymmetric: bool
) -> Callable:
    """The jitted function `(state, variables, rounded, batch) -> Moments`, sums over the batch."""
    values = site_values(apply, [layer.name])

    @static_leaves.jit
    def of_batch(state, variables, rounded, batch) -> Moments:
        found = values(assignment, state, rounded, batch)[layer.name]
        target = values({}, {}, variables, batch)[layer.name].out if asymmetric else None
        return _moments(layer, found, target)

    return of_batch


@jax.jit
def _sum(total: Moments, moments: Moments) -> Moments:
    return jax.tree.map(jnp.add, total, moments)


def _moments(layer: Layer, found: SiteValues, target: jax.Array | None) -> Moments:
    """Sums over one batch, from the site's values and what it should give (None: W x)."""
    matrix, weight = layer.matrix, (found.lhs, found.rhs)[layer.side]
    dtype = carrier_dtype(weight.dtype)
    x = matrix.inputs(values_of(found.operands[1 - layer.side])).astype(dtype)
    weight = matrix.weight(weight).astype(dtype)
    product = functools.partial(jnp.einsum, precision=_PRECISE)
    second = product("grk,grl->gkl", x, x)
    rows = jnp.asarray(x.shape[1], dtype)
    if target is None:
        return Moments(second, jnp.zeros_like(weight), jnp.zeros_like(weight[..., 0]), rows)
    residual = matrix.outputs(target).astype(dtype) - product("grk,gok->gro", x, weight)
    slope = product("gro,grk->gok", residual, x)
    return Moments(second, slope, jnp.sum(jnp.square(residual), axis=1), rows)


def _round(
    solve: Solve, matrix: ProductMatrix, plan: Plan, state: Any, operand: jax.Array, total: Moments
) -> jax.Array:
    """The operand with its values on the grid of its bounds."""
    dtype = carrier_dtype(operand.dtype)

    @jax.jit
    def prepare(operand, state, total):
        return (
            matrix.weight(operand).astype(dtype),
            _static_grid(matrix, plan, state, operand),
            total.means(),
        )

    weight, grid, moments = prepare(operand, state, total)
    found = _no_worse_than_nearest(weight, solve(weight, grid, moments), grid, moments)
    # The transpose of a function that only moves elements is its inverse.
    shape = jax.ShapeDtypeStruct(operand.shape, dtype)
    return jax.linear_transpose(matrix.weight, shape)(found)[0].astype(operand.dtype)


@jax.jit
def _no_worse_than_nearest(
    weight: jax.Array, found: jax.Array, grid: StaticGrid, moments: Moments
) -> jax.Array:
    """For each output channel what was found or the nearest grid values, whichever errs less."""
    nearest = grid.nearest(weight)
    better = moments.excess(weight - found) < moments.excess(weight - nearest)
    return jnp.where(better[..., None], found, nearest)


def _static_grid(matrix: ProductMatrix, plan: Plan, state: Any, operand: jax.Array) -> StaticGrid:
    """The grid under the bounds of a calibration's state, as the matrix has its elements."""
    tensor = in_one_format(operand, plan.quantizer, plan.how)
    tensor, _ = calibrated(tensor, state, update=False)
    grid = tensor.grid()
    assert tensor.bounds is not None  # the calibration has a state
    scale = scale_of(tensor.bounds, grid, plan.how)
    split = jax.eval_shape(lambda x: split_blocks(x, plan.how.granularity), operand).shape

    def of_elements(part: jax.Array) -> jax.Array:
        part = jnp.broadcast_to(part, split)
        return matrix.weight(join_blocks(part, plan.how.granularity, operand.shape))

    value = of_elements(scale.value())
    zero = jnp.zeros_like(value) if scale.zero_point is None else of_elements(scale.zero_point)
    return StaticGrid(grid, value, zero)
