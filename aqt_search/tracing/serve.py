"""Serving: a function on weights that `freeze` has stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from aqt_search.numerics.formats import NumericFormat
from aqt_search.numerics.mixed_stack import MixedStack
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantizer import Quantizer
from aqt_search.products.carriers import check_execution
from aqt_search.tracing.freeze import Dropped, Frozen
from aqt_search.tracing.interpreter import MISSING, Held, Stacks
from aqt_search.tracing.layers import by_layer, layer_indices, layer_name, split_layer
from aqt_search.tracing.matching import matched_sites
from aqt_search.tracing.planned_sites import run_planned
from aqt_search.tracing.plans import make_plans, stacks_of
from aqt_search.tracing.signature import named_after
from aqt_search.tracing.sites import SIDES, Key, Site, SiteError, SiteFormats
from aqt_search.tracing.static_leaves import unwrapped
from aqt_search.tracing.trace import Trace, trace_function
from aqt_search.tracing.transform import CalibrationState, check_assignment, flat_state


def serve(fun: Callable, *, execution: str | Mapping[str, str] = "auto") -> Callable:
    """Returns `served(frozen, *args, **kwargs)`: `fun` on stored weights, for evaluation.

    It computes what `quantize_with_state(fun).evaluate` (or `quantize(fun)`, where activations have
    no static scales) computes from the float parameters: the same bits in "emulated" execution, up
    to the order of summation otherwise.

    Args:
      fun: the function that was frozen, or another of the same parameters, as its encoder alone.
      execution: as in `quantize`.
    """
    check_execution(execution)

    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, Dropped) else leaf

    @named_after(fun, "frozen")
    def served(frozen: Frozen, *args: Any, **kwargs: Any) -> Any:
        params = jax.tree.map(abstract, frozen.params, is_leaf=lambda x: isinstance(x, Dropped))
        params = unwrapped(params)
        trace = trace_function(fun, params, args, kwargs, {})
        sources = matched_sites(frozen.assignment, trace, frozen.lookups)
        own = _renamed(frozen, sources, trace.sites)
        check_assignment(own.formats, trace.sites)
        plans = make_plans(trace, own.for_serving(trace.sites), None)
        inputs = [MISSING if isinstance(x, jax.ShapeDtypeStruct) else x for x in trace.inputs]
        held = Held(flat_state(own.state), own.stored, own.stacks(trace))
        outputs, _ = run_planned(
            trace._replace(inputs=inputs), plans, held, execution=execution, update=False,
            told=frozen.told,
        )  # fmt: skip
        if any(x is MISSING for x in outputs):
            raise SiteError(
                "The function reads a parameter that was stored in codes only, at a site that the"
                f" frozen function has not: {', '.join(_bare(trace, own.formats)) or 'none named'}."
                " Freeze the function that is served, or one that reads as much."
            )
        return jax.tree_util.tree_unflatten(trace.out_tree, outputs)

    return served


class _Own(NamedTuple):
    """What is frozen, by the names of the function that is served."""

    formats: dict[str, SiteFormats]
    stored: dict[Key, QTensor | MixedStack]
    state: CalibrationState
    keys: dict[str, dict[str, jax.Array]]

    def stacks(self, trace: Trace) -> Stacks:
        """What iterations of scans take a slice of; layers in formats of their own stay whole."""
        mixed = {key for key, weight in self.stored.items() if isinstance(weight, MixedStack)}
        stacks = stacks_of(trace.sites, self.formats)
        return frozenset(pair for pair in stacks if pair[0] not in mixed)

    def for_serving(self, sites: Mapping[str, Site]) -> dict[str, SiteFormats]:
        """The formats; stored operands need no calibration any more, others get their keys."""
        found = {}
        for name, formats in self.formats.items():
            stack, layer = split_layer(name, sites)
            keyed = {
                side: dataclasses.replace(getattr(formats, side), key=key)
                for side, key in self.keys.get(name, {}).items()
            }
            plain = {
                side: Quantizer(
                    _stored_format(sites[stack], layer, self.stored[stack, side]), unsigned=False
                )
                for side in SIDES
                if (stack, side) in self.stored
            }
            found[name] = formats._replace(**keyed, **plain)
        return found


def _stored_format(site: Site, layer: str, stored: QTensor | MixedStack) -> NumericFormat:
    if isinstance(stored, QTensor):
        return stored.fmt
    labels = [layer_name("", index) for index in layer_indices(site)]
    return stored.formats[labels.index(layer) if layer else 0]


def _renamed(frozen: Frozen, sources: Mapping[str, str], sites: Mapping[str, Site]) -> _Own:
    """What is frozen of the sites on the right, by the names on the left."""
    stored = {(n, f): q for n, fields in frozen.weights.items() for f, q in fields.items()}
    for key, (name, field), order in frozen.shared:
        weight = frozen.weights[name][field]
        stored[key] = weight.transposed(order) if order else weight

    def own(by_name: Mapping[str, Any]) -> dict[str, Any]:
        return {name: by_name[source] for name, source in sources.items() if source in by_name}

    def own_layers(by_name: Mapping[str, Any]) -> dict[str, Any]:
        layers = by_layer(by_name, sites)
        return {
            name + layer: value
            for name, source in sources.items()
            for layer, value in layers.get(source, {}).items()
        }

    sides = ((name, source, side) for name, source in sources.items() for side in SIDES)
    return _Own(
        own_layers(frozen.assignment),
        {(name, side): stored[s, side] for name, s, side in sides if (s, side) in stored},
        own(frozen.state),
        own_layers(frozen.keys),
    )


def _bare(trace: Trace, formats: Mapping[str, SiteFormats]) -> list[str]:
    """The sites with a weight that nothing frozen is about."""
    named = by_layer(formats, trace.sites)
    return [name for name, site in trace.sites.items() if site.weight and name not in named]
