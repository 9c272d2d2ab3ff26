"""Unrolling: a model whose scans through layers are written out, so that each layer is changed.

    model = unroll(apply, variables, batch)       # None where no scan goes through layers
    formats, bounds = model.assignment(assignment), model.state(state)
    changed = gptq(model.apply, formats, bounds, model.variables, batches)
    variables = model.restacked(changed)

Every leaf that only scans take slices of becomes one leaf for each layer; what the model computes
stays the same. A leaf that something else reads, too, stays whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from aqt_search.tracing.control_flow import Body, Call, Path, Remat, Scan, control_flow
from aqt_search.tracing.layers import by_layer, layer_name, split_layer
from aqt_search.tracing.sites import Site, SiteFormats
from aqt_search.tracing.trace import is_array, trace_function
from aqt_search.tracing.transform import Assignment, CalibrationState, find_sites


@jax.tree_util.register_pytree_with_keys_class
class Layers:
    """In place of a leaf [layers, ...]: the leaves of its layers, or stacks of these again."""

    def __init__(self, values: Sequence[Any]):
        self.values = tuple(values)

    def tree_flatten_with_keys(self):
        """Children, named as layers are."""
        keys = (jax.tree_util.GetAttrKey(f"[{i}]") for i in range(len(self.values)))
        return tuple(zip(keys, self.values)), None

    @classmethod
    def tree_unflatten(cls, _, values):
        """From its children."""
        return cls(values)


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """A function of the variables of each layer."""

    apply: Callable
    variables: Any
    sites: dict[str, Site]  # of the function as it was
    sources: dict[str, tuple[str, str]]  # by site: the one it was, and its layer, as "[3]"

    def assignment(self, assignment: Assignment) -> dict[str, SiteFormats]:
        """The formats of the sites that there are now."""
        layers, found = by_layer(assignment, self.sites), {}
        for name, (source, layer) in self.sources.items():
            own = layers.get(source, {})
            if "" in own:
                found[name] = own[""]
            for label, formats in own.items():
                if label and label.startswith(layer):
                    found[name + label.removeprefix(layer)] = formats
        return found

    def state(self, state: CalibrationState) -> CalibrationState:
        """The states of calibrations of the sites that there are now."""
        found = {}
        for name, (source, layer) in self.sources.items():
            if source in state:
                index = tuple(int(i) for i in layer[1:-1].split("][")) if layer else ()
                found[name] = jax.tree.map(lambda leaf, i=index: leaf[i], state[source])
        return found

    def names(self, names: Sequence[str] | None) -> list[str] | None:
        """Of names of sites, or of layers of them, those that there are now; unknown ones stay."""
        if names is None:
            return None
        found = []
        for name in names:
            stack, layer = split_layer(name, self.sites)
            own = [n for n, (s, at) in self.sources.items() if s == stack and at.startswith(layer)]
            found += own or [name]
        return found

    def restacked(self, variables: Any) -> Any:
        """The variables as they were, given those that there are now."""
        return jax.tree.map(_stacked, variables, is_leaf=lambda leaf: isinstance(leaf, Layers))


def unroll(apply: Callable, variables: Any, *args: Any) -> Unrolled | None:
    """The function with its scans through layers written out; None if there are none.

    Scans under jit and remat are reached, and scans in scans; those under cond and while are not.
    """
    trace = trace_function(apply, variables, args, {}, {})
    leaves, tree = jax.tree.flatten(variables)
    arrays = [place for place, leaf in enumerate(leaves) if is_array(leaf)]
    jaxpr = trace.closed.jaxpr
    depths = {place: _depth(jaxpr, v) for place, v in zip(arrays, jaxpr.invars)}
    if not any(depths.values()):
        return None

    def function(variables, *args, order=None):
        own = tree.flatten_up_to(variables)
        whole = [_abstract(leaf) if isinstance(leaf, Layers) else leaf for leaf in own]
        trace = trace_function(apply, jax.tree.unflatten(tree, whole), args, {}, {})
        inputs = [leaf for leaf in own if isinstance(leaf, Layers) or is_array(leaf)]
        inputs += trace.inputs[len(inputs) :]
        writer = _Writer(trace.site_paths, [] if order is None else order)
        outputs = writer.run(Body(trace.closed.jaxpr, trace.closed.consts), inputs, (), "")
        return jax.tree.unflatten(trace.out_tree, outputs)

    sliced = [_sliced(leaf, depths.get(place, 0)) for place, leaf in enumerate(leaves)]
    found = jax.tree.unflatten(tree, sliced)
    order: list[tuple[str, str]] = []
    jax.eval_shape(lambda arrays: function(_filled(found, arrays), *args, order=order),
                   [leaf for leaf in jax.tree.leaves(found) if is_array(leaf)])  # fmt: skip
    names = list(find_sites(function, found, *args))
    if len(names) != len(order):  # of some iteration a product is not used
        return None
    return Unrolled(function, found, trace.sites, dict(zip(names, order)))


def _filled(tree: Any, arrays: Sequence[Any]) -> Any:
    rest = iter(arrays)
    return jax.tree.map(lambda leaf: next(rest) if is_array(leaf) else leaf, tree)


def _depth(jaxpr: jex_core.Jaxpr, variable: Any) -> int:
    """How many scans, each inside of the one before, are all that takes a variable, by slices."""
    if any(variable is v for v in jaxpr.outvars):
        return 0
    uses = [
        _depth_of_use(eqn, place)
        for eqn in jaxpr.eqns
        for place, v in enumerate(eqn.invars)
        if v is variable
    ]
    return min(uses, default=0)


def _depth_of_use(eqn: jex_core.JaxprEqn, place: int) -> int:
    match control_flow(eqn):
        case Call(body) | Remat(body):
            return _depth(body.jaxpr, body.jaxpr.invars[place])
        case Scan() as scan if place >= scan.consts + scan.carries:
            return 1 + _depth(scan.body.jaxpr, scan.body.jaxpr.invars[place])
    return 0


def _sliced(leaf: Any, depth: int) -> Any:
    return leaf if depth == 0 else Layers([_sliced(part, depth - 1) for part in leaf])


def _stacked(leaf: Any) -> Any:
    if not isinstance(leaf, Layers):
        return leaf
    parts = [_stacked(part) for part in leaf.values]
    numpy = all(isinstance(part, (np.ndarray, np.generic)) for part in parts)
    return np.stack(parts) if numpy else jnp.stack(parts)


def _abstract(leaf: Layers) -> jax.ShapeDtypeStruct:
    first = leaf.values[0]
    first = _abstract(first) if isinstance(first, Layers) else first
    return jax.ShapeDtypeStruct((len(leaf.values), *first.shape), first.dtype)


class _Writer:
    """Evaluates jaxprs with those scans written out that go through `Layers`."""

    def __init__(self, site_paths: dict[Path, str], order: list[tuple[str, str]]):
        self._site_paths = site_paths
        self._order = order  # (site, layer) as they are met

    def run(self, body: Body, args: Sequence, path: Path, layer: str) -> list:
        """The results of a body."""
        jaxpr = body.jaxpr
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*body.consts, *args)))

        def read(atom):
            return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            operands, here = [read(v) for v in eqn.invars], (*path, number)
            if any(isinstance(x, Layers) for x in operands):
                with jax.named_scope(str(eqn.source_info.name_stack) or "scan"):
                    outputs = self._entered(control_flow(eqn), operands, here, layer)
            else:
                inside = (n for p, n in self._site_paths.items() if p[: len(here)] == here)
                self._order.extend((name, layer) for name in inside)
                outputs = _as_it_was(jaxpr, eqn, operands)
            env.update(zip(eqn.outvars, outputs))
        return [read(v) for v in jaxpr.outvars]

    def _entered(self, flow, operands: Sequence, here: Path, layer: str) -> list:
        if isinstance(flow, (Call, Remat)):
            return self.run(flow.body, operands, flow.body.under(here), layer)
        assert isinstance(flow, Scan)  # `_depth` found nothing else
        consts, carry, xs = flow.split(operands)
        results: list[list] = [[]] * flow.length
        order = reversed(range(flow.length)) if flow.reverse else range(flow.length)
        for i in order:
            own = [x.values[i] if isinstance(x, Layers) else x[i] for x in xs]
            name, path = layer_name(layer, (i,)), flow.body.under(here)
            outputs = self.run(flow.body, [*consts, *carry, *own], path, name)
            carry, results[i] = outputs[: flow.carries], outputs[flow.carries :]
        return [*carry, *map(jnp.stack, zip(*results))]


def _as_it_was(jaxpr: jex_core.Jaxpr, eqn: jex_core.JaxprEqn, operands: Sequence) -> list:
    """The results of an equation, custom derivative rules included."""
    inputs = {v: x for v, x in zip(eqn.invars, operands) if not isinstance(v, jex_core.Literal)}
    alone = jaxpr.replace(
        constvars=(), invars=list(inputs), outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects
    )
    return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(alone, ()))(*inputs.values())
