"""Where the channels of a tensor are, and where moving or pooling its elements puts them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from aqt_search.tracing.flat_graph import FlatGraph, Node

# Every element comes from one element of the first operand.
MOVES = (
    *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims", "name"),
    *("optimization_barrier", "reshape", "sharding_constraint", "squeeze", "stop_gradient"),
    "transpose",
)
# Sums, maxima or parts along axes that are no channels: scaling a channel by s > 0 scales it after.
_REDUCTIONS = ("reduce_max", "reduce_min", "reduce_sum")
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
POOLS = (*_REDUCTIONS, *_WINDOWS, "pad", "rev", "slice")
SUMS = ("reduce_sum", "reduce_window_sum")


class Channels(NamedTuple):
    """Element i of `axis` belongs to channel (i // inner) % count.

    `inner` is 1 but where later axes were flattened into it; the axis may hold the channels several
    times over where earlier axes were.
    """

    axis: int
    count: int
    inner: int = 1

    def of_elements(self, size: int) -> np.ndarray:
        """The channel of every element of an axis of this size: int, shape [size]."""
        return np.arange(size) // self.inner % self.count


def moved(graph: FlatGraph, node: Node, channels: Channels) -> Channels | None:
    """The channels of the result of an equation in `MOVES` or `POOLS`, given those of its operand.

    None where channels are mixed, split over axes or cut, or the primitive is another.
    """
    before, after = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    name, params, axis = node.primitive, node.eqn.params, channels.axis
    if name in ("reshape", "squeeze", "expand_dims"):
        plain = params.get("dimensions") is None or name != "reshape"
        return _reshaped(before, after, channels) if plain else None
    if name == "transpose":
        return channels._replace(axis=params["permutation"].index(axis))
    if name == "broadcast_in_dim":
        new = params["broadcast_dimensions"][axis]
        return channels._replace(axis=new) if after[new] == before[axis] else None
    if name in MOVES:
        return channels if _stays_floating(graph, node) else None
    if name in _REDUCTIONS:
        axes = params["axes"]
        return None if axis in axes else channels._replace(axis=axis - sum(a < axis for a in axes))
    if name in POOLS and _keeps_axis(graph, node, axis):
        return channels
    return None


def _stays_floating(graph: FlatGraph, node: Node) -> bool:
    """Whether it is not a rounding to integers."""
    (result,) = node.outputs
    return jnp.issubdtype(graph.avals[result].dtype, jnp.floating)


def _reshaped(before, after, channels: Channels) -> Channels | None:
    """Row-major arithmetic: how many elements are between one channel and the next."""
    distance = math.prod(before[channels.axis + 1 :]) * channels.inner
    for axis in reversed(range(len(after))):
        behind = math.prod(after[axis + 1 :])
        if distance % behind == 0:
            inner = distance // behind
            if after[axis] % (inner * channels.count) == 0:
                return Channels(axis, channels.count, inner)
    return None


def _keeps_axis(graph: FlatGraph, node: Node, axis: int) -> bool:
    """Whether pooling, padding, reversing or slicing leaves an axis as it is."""
    params = node.eqn.params
    if graph.shape(node.inputs[0])[axis] != graph.shape(node.outputs[0])[axis]:
        return False
    if node.primitive == "rev":
        return axis not in params["dimensions"]
    if node.primitive == "pad":
        zero = graph.scalar(node.inputs[1]) == 0
        return zero and params["padding_config"][axis] == (0, 0, 0)
    return node.primitive == "slice" or params["window_dimensions"][axis] == 1
