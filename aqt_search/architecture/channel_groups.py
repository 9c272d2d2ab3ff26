"""Channel groups: channels of a model that must be cut together, with a proof that they can be.

    groups = channel_groups(model.apply, variables, images)
    groups["block1/expand/kernel"].axes     # (("block1/expand/kernel", 3), ...)

Masking all of a group's parameters is cutting its channels if what they feed is 0 there: then no
product, and no range of values that a scale is made of, sees them. This is proved by following the
zeros through the traced function, or the group is refused with the site and the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from aqt_search.tracing.axis_groups import Axes, Axis, is_summed, product_loops
from aqt_search.tracing.cut_values import CutValues
from aqt_search.tracing.flat_graph import FlatGraph, Value, trace_graph


class ChannelGroup(NamedTuple):
    """Channels of one number, wherever they are an axis of a parameter.

    Attributes:
      name: that of the weight that makes them, `block1/expand/kernel`; of several the first.
      size: the number of channels.
      axes: (name of a leaf, axis), of all leaves that have them.
      refused: why they cannot be cut; None if they can.
    """

    name: str
    size: int
    axes: tuple[tuple[str, int], ...]
    refused: str | None


def channel_groups(apply: Callable, variables: Any, *args: Any) -> dict[str, ChannelGroup]:
    """The channel groups of `apply(variables, *args)` that a site's weight has an axis of, by name.

    Nothing is computed; arrays may be abstract.

    Args:
      apply: a function of variables and data, in evaluation mode: random bits freeze what they
        meet.
      variables: its first argument.
      *args: the data.

    Raises:
      SiteError: `apply` names a mapped axis that is not bound.
    """
    return Channels(trace_graph(apply, variables, *args)).groups


class SiteLoop(NamedTuple):
    """A loop of a site's multiply-accumulates that runs along the channels of a group."""

    group: str
    summed: bool  # whether the product sums over it


class Channels:
    """The channel groups of a graph, and where its sites have them.

    Attributes:
      graph: the traced function.
      groups: by name, in program order.
    """

    def __init__(self, graph: FlatGraph):
        self.graph, self._nodes = graph, graph.site_nodes()
        self._axes, self._cut = Axes(graph), CutValues(graph)
        self._leaves: dict[Axis, list[tuple[str, int]]] = {}
        for value, leaf in graph.leaves.items():
            for axis, size in enumerate(graph.shape(value)):
                if size > 1:
                    root = self._axes.group((value, axis))
                    self._leaves.setdefault(root, []).append((leaf.name, axis))
        self._names = self._named()
        self.groups: dict[str, ChannelGroup] = {
            name: ChannelGroup(
                name, graph.shape(root[0])[root[1]], tuple(self._leaves[root]), self._refused(root)
            )
            for root, name in self._names.items()
        }

    def group_of(self, value: Value, axis: int) -> str | None:
        """The name of the group of an axis; None if it has none."""
        return self._names.get(self._axes.group((value, axis)))

    def of_site(self, name: str) -> tuple[SiteLoop, ...]:
        """A site's loops along channels; one inside of a loop or a conditional has none."""
        node = self._nodes.get(name)
        if node is None:
            return ()
        found = []
        for loop in product_loops(self.graph, node):
            (operand, axis), *_ = loop.axes
            group = self.group_of(node.inputs[operand], axis)
            if group is not None:
                found.append(SiteLoop(group, is_summed(self.graph, node, loop)))
        return tuple(found)

    def reading(self, group: str) -> list[tuple[str, int]]:
        """The axes, (leaf, axis), of the weights that are summed over the channels of a group."""
        readers = {
            self._weight(site)
            for site in self._nodes
            for loop in self.of_site(site)
            if loop.group == group and loop.summed
        }
        return [(leaf, axis) for leaf, axis in self.groups[group].axes if leaf in readers]

    def taps(self, name: str) -> list[tuple[str, int]]:
        """The axes of the window of a convolution, (leaf, axis); [] where they are no leaf's."""
        node = self._nodes.get(name)
        if node is None:
            return []
        axes = self.window_axes(name)
        roots = [self._axes.group((node.inputs[1], axis)) for axis in axes]
        found = [self._leaves.get(root, []) for root in roots]
        return [axes[0] for axes in found] if all(len(axes) == 1 for axes in found) else []

    def window_axes(self, name: str) -> tuple[int, ...]:
        """The axes of the window of a convolution, of its kernel as the site takes it."""
        return tuple(self._nodes[name].eqn.params["dimension_numbers"][1][2:])

    def shape_of(self, leaf: str) -> tuple[int, ...]:
        """The shape of a leaf."""
        return next(
            self.graph.shape(v) for v, found in self.graph.leaves.items() if found.name == leaf
        )

    def size_of(self, leaf: str, axis: int) -> int:
        """The size of an axis of a leaf."""
        return self.shape_of(leaf)[axis]

    def _named(self) -> dict[Axis, str]:
        """The roots of groups with channels of a weight, and their names, in program order."""
        makers: dict[Axis, str] = {}
        readers: dict[Axis, str] = {}
        for site, node in self._nodes.items():
            weight = self._weight(site)
            if weight is None:
                continue
            at = 1 if self.graph.sites[site].weight is self.graph.sites[site].rhs else 0
            for loop in product_loops(self.graph, node):
                axis = loop[at]
                if axis is None:
                    continue
                root = self._axes.group((node.inputs[at], axis))
                if root in self._leaves:
                    found = makers if len(loop.axes) == 1 else readers
                    found.setdefault(root, weight)
        names: dict[Axis, str] = {}
        for root, name in makers.items():
            names[root] = _free(name, names.values())
        for root, name in readers.items():  # what no weight makes: the channels of images
            if root not in names and self._axes.frozen(root) is None:
                names[root] = _free(name, names.values())
        return names

    def _weight(self, site: str) -> str | None:
        """The leaf that is the weight of a site, as far as it has one."""
        weight = self.graph.sites[site].weight
        return None if weight is None else weight.parameter

    def _refused(self, root: Axis) -> str | None:
        frozen = self._axes.frozen(root)
        if frozen is not None:
            return frozen
        for site, node in self._nodes.items():
            for side, value in zip(self.graph.sites[site].equation_sides, node.inputs):
                for axis in range(len(self.graph.shape(value))):
                    if self._axes.group((value, axis)) != root:
                        continue
                    number = self._cut.at(value, axis)
                    if number is None or number != 0:
                        known = "not known to be 0" if number is None else f"{number}, not 0,"
                        return f"at site {site!r} {side} is {known} where they are cut"
        return None


def _free(name: str, taken: Collection[str]) -> str:
    """The name, numbered if it is taken."""
    numbered = (name if n == 0 else f"{name}#{n}" for n in itertools.count())
    return next(found for found in numbered if found not in taken)
