"""Shared weights: which sites read what is stored for another one.

A parameter that several sites use in one format is stored once: a table that is looked up in and
multiplied by, a layer that is called twice, the weights of a prompt and of the loop after it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

from aqt_search.numerics.granularity import Granularity
from aqt_search.tracing.interpreter import Stacks
from aqt_search.tracing.plans import Plan
from aqt_search.tracing.sites import Key, Operand, Site


class Shared(NamedTuple):
    """An operand that is stored as another one."""

    key: Key
    owner: Key
    order: tuple[int, ...]  # the owner's axes in the order of its own; () as they are


def shared_weights(
    sites: Mapping[str, Site], plans: Mapping[Key, Plan], stacks: Stacks
) -> tuple[Shared, ...]:
    """The operands that equal another one once quantized, of all that are planned.

    Those whose bounds come from a state are left out: each has its own. A table that is looked up
    in is the owner, since it is stored in rows.
    """
    groups: dict[Hashable, list[Key]] = {}
    for key, plan in plans.items():
        operand = getattr(sites[key[0]], key[1], None)  # None: it is of a gradient
        own = any(
            p.quantizer.calibration.read is not None or p.quantizer.key is not None
            for p in plan.each
        )
        if operand is not None and operand.array is not None and not own:
            groups.setdefault(_identity(operand, plan, key, stacks), []).append(key)
    found = []
    for keys in groups.values():
        owner = next((key for key in keys if sites[key[0]].kind == "gather"), keys[0])
        origin = _order(getattr(sites[owner[0]], owner[1]))
        for key in keys:
            if key != owner:
                own = _order(getattr(sites[key[0]], key[1]))
                order = tuple(origin.index(axis) for axis in own)
                found.append(Shared(key, owner, () if own == origin else order))
    return tuple(found)


def _order(operand: Operand) -> tuple[int, ...]:
    return operand.order or tuple(range(len(operand.shape)))


def _identity(operand: Operand, plan: Plan, key: Key, stacks: Stacks) -> Hashable:
    """Equal for operands whose codes and scales are: of one array, in one format, stacked alike."""
    order, how = _order(operand), plan.how
    channels, size, block, _ = how.granularity
    axes = None if channels is None else tuple(sorted(order[axis] for axis in channels))
    granularity = Granularity(axes, size, None if block is None else order[block])
    lengths = tuple(length for path, length in operand.sliced_by if (key, path) in stacks)
    ways = how._replace(granularity=granularity, axis_name=None)
    formats = tuple(tuple(p.quantizer.fmt) for p in plan.each)
    return operand.array, formats, ways, lengths
