"""Per-channel expressions of parameters, as sums of products of powers of leaves.

    -mean * (var + eps)^-1/2 * scale  =  Term(-1, ((mean + 0)^1, (scale + 0)^1, (var + eps)^-1/2))

In this form BatchNorm is the same whichever way it was written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from aqt_search.tracing.channels import MOVES, Channels, moved
from aqt_search.tracing.flat_graph import FlatGraph, Leaf, Node, Value

_MOST_TERMS = 8  # an expression with more is no affine operation of a layer


class Leaves(Protocol):
    """The values of leaves by their index."""

    def __getitem__(self, index: int, /) -> Any: ...


class Factor(NamedTuple):
    """(leaf + offset) ** power, one number for each channel."""

    leaf: Leaf
    power: float = 1.0
    offset: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it is the leaf itself."""
        return self.power == 1 and self.offset == 0

    def value(self, leaves: Leaves) -> np.ndarray:
        """Its float64 value, shape [channels]."""
        leaf = np.asarray(leaves[self.leaf.index], np.float64).reshape(-1)
        return (leaf + self.offset) ** self.power


class Term(NamedTuple):
    """coefficient * product of factors."""

    coefficient: float = 1.0
    factors: tuple[Factor, ...] = ()  # sorted

    def times(self, other: Term) -> Term:
        """The product."""
        factors = tuple(sorted(self.factors + other.factors))
        return Term(self.coefficient * other.coefficient, factors)

    def to_power(self, power: float) -> Term:
        """The term raised to a power; the coefficient has to be positive unless power is whole."""
        factors = tuple(f._replace(power=f.power * power) for f in self.factors)
        return Term(self.coefficient**power, factors)

    def value(self, leaves: Leaves) -> np.ndarray | float:
        """Its float64 value, shape [channels]."""
        product = self.coefficient
        for factor in self.factors:
            product = product * factor.value(leaves)
        return product


class Expression(NamedTuple):
    """The sum of terms, and where its channels are (None for a constant)."""

    terms: tuple[Term, ...]
    channels: Channels | None


class Reader:
    """Reads expressions of parameters; remembers the equations and leaves they are made of."""

    def __init__(self, graph: FlatGraph):
        self.graph = graph
        self.nodes: dict[int, Node] = {}
        self.values: set[Value] = set()

    def read(self, value: Value, channels: Channels, most: int = _MOST_TERMS) -> tuple[Term, ...]:
        """The terms of a value that depends on parameters alone and has these channels.

        (), with nothing more remembered, if it has another form, or more than `most` terms.
        """
        attempt = Reader(self.graph)
        found = attempt.expression(value)
        if found is None or found.channels is None or not 1 <= len(found.terms) <= most:
            return ()
        if not _aligned(found.channels, channels):
            return ()
        self.nodes |= attempt.nodes
        self.values |= attempt.values
        return found.terms

    def shared(self, users: set[int]) -> str | None:
        """Why changing the leaves changes something else than the equations `users`, if it does."""
        inside = users | set(self.nodes)
        for value in sorted(self.values):
            others = [n for n in self.graph.consumers[value] if n.index not in inside]
            if others or value in self.graph.outputs:
                leaf = self.graph.leaves.get(value)
                what = f"parameter {leaf.name!r}" if leaf else "a value made of its parameters"
                return f"{what} is used in another place, too"
        return None

    def expression(self, value: Value) -> Expression | None:
        """The expression of a value, with what it is made of remembered; None if it has none."""
        graph = self.graph
        if value in graph.leaves:
            self.values.add(value)
            return _of_leaf(graph, value)
        scalar = graph.scalar(value)
        if scalar is not None:
            return Expression((Term(float(scalar)),), None)
        node = graph.producer.get(value)
        if node is None or value in graph.from_data or len(node.outputs) != 1:
            return None
        self.nodes[node.index] = node
        self.values.add(value)
        found = [self.expression(operand) for operand in node.inputs]
        operands = [operand for operand in found if operand is not None]
        if len(operands) < len(found) or not operands:
            return None
        if node.primitive in MOVES:
            (operand,) = operands
            channels = operand.channels and moved(graph, node, operand.channels)
            return operand._replace(channels=channels) if channels else None
        return _combined(node, operands)


def _of_leaf(graph: FlatGraph, value: Value) -> Expression | None:
    shape = graph.shape(value)
    axes = [axis for axis, size in enumerate(shape) if size != 1] or [len(shape) - 1]
    if len(axes) != 1 or not shape:
        return None
    channels = Channels(axes[0], shape[axes[0]])
    return Expression((Term(1.0, (Factor(graph.leaves[value]),)),), channels)


def _aligned(first: Channels, second: Channels) -> bool:
    """Whether two operands of an elementwise operation have the same channels."""
    return first == second or first.count == second.count == 1


def _combined(node: Node, operands: list[Expression]) -> Expression | None:
    channels = [operand.channels for operand in operands if operand.channels is not None]
    if not all(_aligned(channels[0], other) for other in channels):
        return None
    terms = _combined_terms(node.primitive, [operand.terms for operand in operands])
    return Expression(terms, channels[0] if channels else None) if terms else None


def _combined_terms(name: str, operands: list[tuple[Term, ...]]) -> tuple[Term, ...] | None:
    first, second = operands[0], operands[-1]
    if name in ("add", "add_any"):
        return first + second
    if name in ("sub", "neg"):
        negative = negated(second)
        return negative if name == "neg" else first + negative
    if name == "mul":
        return tuple(a.times(b) for a in first for b in second)
    if name == "div" and len(second) == 1 and second[0].coefficient:
        return tuple(a.times(second[0].to_power(-1)) for a in first)
    if name in ("sqrt", "rsqrt"):
        return _root(first, 0.5 if name == "sqrt" else -0.5)
    return None


def negated(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms with their signs changed."""
    return tuple(term._replace(coefficient=-term.coefficient) for term in terms)


def _root(terms: tuple[Term, ...], power: float) -> tuple[Term, ...] | None:
    """(leaf + eps) ** power, or that of a single product."""
    if len(terms) == 1 and terms[0].coefficient > 0:
        return (terms[0].to_power(power),)
    constants = [t.coefficient for t in terms if not t.factors]
    leaves = [t for t in terms if t.factors]
    if len(leaves) != 1 or leaves[0].coefficient != 1 or len(leaves[0].factors) != 1:
        return None
    (factor,) = leaves[0].factors
    return (Term(1.0, (Factor(factor.leaf, power, sum(constants)),)),) if factor.is_plain else None
