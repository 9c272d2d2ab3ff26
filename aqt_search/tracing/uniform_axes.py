"""Uniform axes: along which all of a value's elements are equal, as after a broadcast.

A learned query is broadcast to the batch before it meets it. What is stored of it, and its name,
must not depend on how large the batch was when it was traced.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.extend.core as jex_core

Axes = frozenset[int]

_ELEMENTWISE = (
    *("abs", "add", "add_any", "and", "cbrt", "ceil", "clamp", "convert_element_type", "copy"),
    *("copy_p", "cos", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor"),
    *("ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max"),
    *("min", "mul", "ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt"),
    *("select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh", "xor"),
)
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")


def every_axis(atom) -> Axes:
    """All axes of a value: one that is uniform as a whole."""
    return frozenset(range(len(getattr(atom.aval, "shape", ()))))


def uniform_results(eqn: jex_core.JaxprEqn, inputs: Sequence[Axes]) -> Axes:
    """The uniform axes of an equation's result, from those of its operands; none if not known.

    An axis of length 1 is uniform, whether it is listed or not.
    """
    name, params = eqn.primitive.name, eqn.params
    shapes = [tuple(getattr(v.aval, "shape", ())) for v in eqn.invars]
    known = [
        axes | {axis for axis, size in enumerate(shape) if size == 1}
        for axes, shape in zip(inputs, shapes)
    ]
    if len(eqn.outvars) != 1:
        return frozenset()
    out = tuple(getattr(eqn.outvars[0].aval, "shape", ()))
    if name in _ELEMENTWISE:
        whole = [axes for axes, shape in zip(known, shapes) if shape]  # lengths of 1 are repeated
        if all(len(shape) in (0, len(out)) for shape in shapes):
            return frozenset(range(len(out))).intersection(*whole)
    elif name == "broadcast_in_dim":
        placed = dict(zip(params["broadcast_dimensions"], range(len(shapes[0]))))
        return frozenset(
            a for a in range(len(out)) if placed.get(a) is None or placed[a] in known[0]
        )
    elif name == "tile":
        return frozenset(known[0])
    elif name == "reshape":
        return _reshaped(shapes[0], out, known[0])
    elif name == "transpose":
        return frozenset(new for new, axis in enumerate(params["permutation"]) if axis in known[0])
    elif name == "squeeze":
        left = [a for a in range(len(shapes[0])) if a not in params["dimensions"]]
        return frozenset(new for new, axis in enumerate(left) if axis in known[0])
    elif name in _REDUCTIONS:
        left = [a for a in range(len(shapes[0])) if a not in params["axes"]]
        return frozenset(new for new, axis in enumerate(left) if axis in known[0])
    elif name == "dot_general":
        return _multiplied(params["dimension_numbers"], shapes, known)
    return frozenset()


def _reshaped(shape: tuple[int, ...], out: tuple[int, ...], known: Axes) -> Axes:
    """Axes of `out`, where each is made of axes of `shape` that are all uniform."""
    found, start = set(), 0
    for axis, size in enumerate(out):
        end, product = start, 1
        while end < len(shape) and (product < size or shape[end] == 1):
            product, end = product * shape[end], end + 1
        if product != size:  # several axes of `out` share one of `shape`
            rest = all(a in known for a in range(start, len(shape)))
            return frozenset(found | (set(range(axis, len(out))) if rest else set()))
        if all(a in known for a in range(start, end)):
            found.add(axis)
        start = end
    return frozenset(found)


def _multiplied(numbers, shapes, known) -> Axes:
    contracting, batch = numbers
    free = [
        [axis for axis in range(len(shape)) if axis not in (*contracted, *batched)]
        for shape, contracted, batched in zip(shapes, contracting, batch)
    ]
    order = [lhs in known[0] and rhs in known[1] for lhs, rhs in zip(*batch)]
    order += [axis in axes for side, axes in zip(free, known) for axis in side]
    return frozenset(axis for axis, uniform in enumerate(order) if uniform)


def collapsed(shape: Sequence[int], uniform: Sequence[int]) -> tuple[int, ...]:
    """A shape with one element along each uniform axis."""
    return tuple(1 if axis in uniform else size for axis, size in enumerate(shape))


def one_of(x: jax.Array, uniform: Sequence[int]) -> jax.Array:
    """An array with one of the equal elements along each uniform axis."""
    return x[tuple(slice(0, 1) if a in uniform else slice(None) for a in range(x.ndim))]
