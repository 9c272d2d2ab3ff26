"""The leaf that a site's weight is, so that a weight can be changed where the model keeps it.

A weight may reach its site through casts, reshapes and transpositions, which are undone. Where more
happens on the way (weight standardization, a LoRA sum), or the leaf is used elsewhere too, no leaf
holds the weight alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core

from aqt_search.ptq.captures import equations_to
from aqt_search.tracing.control_flow import Call, Remat, control_flow
from aqt_search.tracing.liveness import used_equations
from aqt_search.tracing.origins import array_type
from aqt_search.tracing.trace import Trace, is_array

_REARRANGEMENTS = (
    "reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "copy",
)  # fmt: skip


class WeightLeaf(NamedTuple):
    """Where a site's weight is kept: a leaf of the variables."""

    index: int  # among the array leaves of the variables
    operand: Callable[[jax.Array], jax.Array]  # the leaf as it enters the site

    def read(self, variables: Any) -> jax.Array:
        """The operand that the variables hold."""
        arrays = [leaf for leaf in jax.tree.leaves(variables) if is_array(leaf)]
        return self.operand(arrays[self.index])

    def write(self, variables: Any, operand: jax.Array) -> Any:
        """The variables whose leaf enters the site as `operand`."""
        leaves, tree = jax.tree.flatten(variables)
        places = [place for place, leaf in enumerate(leaves) if is_array(leaf)]
        place = places[self.index]
        leaf = jax.ShapeDtypeStruct(leaves[place].shape, leaves[place].dtype)
        # The transpose of a linear function that only moves elements is its inverse.
        (leaves[place],) = jax.linear_transpose(self.operand, leaf)(operand)
        return jax.tree.unflatten(tree, leaves)


class NoLeaf(Exception):
    """No leaf holds the weight alone; the message says why."""


def weight_leaf(trace: Trace, name: str, side: str) -> WeightLeaf:
    """The leaf of the variables that enters `side` of site `name`, which must not be in a loop.

    Raises:
      NoLeaf: the operand is computed from the leaf, or something else reads the leaf, too.
    """
    *around, (jaxpr, eqn) = equations_to(trace, name)
    operand = eqn.invars[trace.sites[name].equation_sides.index(side)]
    position, steps = _followed(jaxpr, operand)
    for jaxpr, eqn in reversed(around):
        position, earlier = _followed(jaxpr, eqn.invars[position])
        steps = [*earlier, *steps]
    return WeightLeaf(position, _composed(steps))


def _followed(jaxpr: jex_core.Jaxpr, atom) -> tuple[int, list[jex_core.JaxprEqn]]:
    """The input of a jaxpr that a value is a rearrangement of, and the equations in between."""
    defined_by = {v: (eqn, place) for eqn in jaxpr.eqns for place, v in enumerate(eqn.outvars)}
    reads = _reads(jaxpr)
    steps: list[jex_core.JaxprEqn] = []
    while True:
        if isinstance(atom, jex_core.Literal) or atom in jaxpr.constvars:
            raise NoLeaf("its weight is a constant of the function")
        if reads.get(atom, 0) > 1:
            raise NoLeaf("its weight is used elsewhere in the model, too")
        if atom in jaxpr.invars:
            return jaxpr.invars.index(atom), steps
        eqn, place = defined_by[atom]
        if isinstance(flow := control_flow(eqn), (Call, Remat)):
            inside = flow.body.jaxpr
            position, inner = _followed(inside, inside.outvars[place])
            steps, atom = [*inner, *steps], eqn.invars[position]
        elif _only_moves(eqn):
            steps, atom = [eqn, *steps], eqn.invars[0]
        else:
            raise NoLeaf(
                f"its weight is not a parameter as such, but computed by {eqn.primitive.name}"
            )


def _only_moves(eqn: jex_core.JaxprEqn) -> bool:
    """Whether every element goes to one place, as it is or cast."""
    if eqn.primitive.name not in _REARRANGEMENTS:
        return False
    return array_type(eqn.invars[0]).size == array_type(eqn.outvars[0]).size


def _reads(jaxpr: jex_core.Jaxpr) -> dict[Any, int]:
    """How often each variable is read by what is used of a jaxpr, its results included."""
    results, _ = used_equations(jaxpr, [True] * len(jaxpr.outvars))
    used = [eqn for eqn, flags in zip(jaxpr.eqns, results) if any(flags) or eqn.effects]
    reads: dict[Any, int] = {}
    for atom in (*(v for eqn in used for v in eqn.invars), *jaxpr.outvars):
        if not isinstance(atom, jex_core.Literal):
            reads[atom] = reads.get(atom, 0) + 1
    return reads


def _composed(steps: list[jex_core.JaxprEqn]) -> Callable[[jax.Array], jax.Array]:
    """The function that a chain of equations of one operand each is."""

    def operand(leaf: jax.Array) -> jax.Array:
        for eqn in steps:
            leaf = eqn.primitive.bind(leaf, **eqn.params)
        return leaf

    return operand
