"""The affine operations by parameters that activations come from, such as those of LayerNorm."""

from __future__ import annotations

import dataclasses

from aqt_search.ptq.affine import Reader
from aqt_search.ptq.dataflow import Consumer, read_by, site_flows
from aqt_search.tracing.channels import MOVES, Channels
from aqt_search.tracing.flat_graph import FlatGraph, Leaf, Node, Value


@dataclasses.dataclass(frozen=True)
class Producer:
    """An affine operation by parameters whose result sites read: that of LayerNorm, mostly.

    value = something * gain + shifts, for every channel.
    """

    gain: Leaf
    shifts: tuple[Leaf, ...]
    channels: Channels
    consumers: tuple[Consumer, ...]
    obstacles: tuple[str, ...]


def affine_producers(graph: FlatGraph) -> tuple[list[Producer], dict[str, str]]:
    """The affine operations whose results sites read; for sites without one the reason."""
    found: dict[Value, Producer | str] = {}
    reasons = {}
    for name, flow in site_flows(graph).items():
        if flow.weight is None or flow.weight.axes.inputs is None:
            reasons[name] = flow.reason or "its input channels are not a single axis"
            continue
        assert flow.activation is not None  # it has a weight
        value = _origin(graph, flow.activation)
        if value not in found:
            found[value] = _producer(graph, value, flow.weight.inputs)
        producer = found[value]
        if isinstance(producer, str):
            reasons[name] = producer
        elif name not in {consumer.site for consumer in producer.consumers}:
            reasons[name] = "its input channels are not those of what it comes from"
    return [p for p in found.values() if isinstance(p, Producer)], reasons


def _origin(graph: FlatGraph, value: Value) -> Value:
    """The value that a site's activation is, before its elements were moved."""
    while value in graph.producer and graph.producer[value].primitive in (*MOVES, "slice"):
        value = graph.producer[value].inputs[0]
    return value


def _producer(graph: FlatGraph, value: Value, count: int) -> Producer | str:
    reason = "its activation does not come from an affine operation by parameters, as LayerNorm's"
    axes = [axis for axis, size in enumerate(graph.shape(value)) if size == count]
    if not axes:
        return reason
    channels, root = Channels(axes[-1], count), value
    reader, used, shifts = Reader(graph), set(), []
    while (node := graph.producer.get(value)) is not None:
        used.add(node.index)
        if node.primitive == "mul":
            gain = _gain_leaf(graph, reader, used, node, channels)
            if gain is None:
                return reason
            consumers, obstacles = read_by(graph, root, channels)
            refused = reader.shared(used)
            return refused or Producer(gain, tuple(shifts), channels, consumers, obstacles)
        if node.primitive in ("add", "add_any"):
            value, leaf = _plain_operand(reader, node, channels)
            if leaf is None:
                return reason
            shifts.append(leaf)
        elif node.primitive == "convert_element_type":
            (value,) = node.inputs
        else:
            return reason
        if graph.only_consumer(value) is None:
            return reason
    return reason


def _plain_operand(reader: Reader, node: Node, channels: Channels) -> tuple[Value, Leaf | None]:
    """(the operand that is data, a plain leaf that the other is a multiple of)."""
    for operand, other in (node.inputs, node.inputs[::-1]):
        terms = reader.read(operand, channels, most=1)
        if terms:
            plain = [factor.leaf for factor in terms[0].factors if factor.is_plain]
            return other, plain[0] if plain else None
    return node.inputs[0], None


def _gain_leaf(graph: FlatGraph, reader: Reader, used: set[int], node: Node, channels: Channels):
    """The plain leaf that a product of several values is multiplied by; None if there is none."""
    _, leaf = _plain_operand(reader, node, channels)
    for value in node.inputs if leaf is None else ():
        factor = graph.producer.get(value)
        only = graph.only_consumer(value) is not None
        if leaf is None and only and factor is not None and factor.primitive == "mul":
            used.add(factor.index)
            leaf = _gain_leaf(graph, reader, used, factor, channels)
    return leaf
