"""Depth: blocks of a model that can be skipped, with a proof that their zeros skip them.

A block whose parameters are all 0 adds 0 to what it was given: it is as if it were not there. The
proof follows the zeros through the traced function until nothing that depends on the block is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aqt_search.architecture.errors import ArchitectureError
from aqt_search.tracing.cut_values import CutValues
from aqt_search.tracing.flat_graph import FlatGraph, Node, Value


def leaves_of(graph: FlatGraph, block: str) -> dict[Value, str]:
    """The names of the leaves of a block: those that have its name as one of their parts.

    Raises:
      ArchitectureError: there are none.
    """
    parts = tuple(block.split("/"))
    found = {
        value: leaf.name
        for value, leaf in graph.leaves.items()
        if any(leaf.name.split("/")[i : i + len(parts)] == list(parts) for i in (0, 1))
    }
    if not found:
        tops = dict.fromkeys(leaf.name.split("/")[0] for leaf in graph.leaves.values())
        raise ArchitectureError(
            f"depths name the block {block!r}, which the model has no parameters of. Its parts are"
            f" {', '.join(tops)}."
        )
    return found


def skipped_sites(graph: FlatGraph, block: str) -> frozenset[str]:
    """The sites that are not there if a block is skipped.

    Raises:
      ArchitectureError: the model without the block is not the model with its parameters at 0.
    """
    leaves = leaves_of(graph, block)
    cut = CutValues(graph, frozenset(leaves))
    same: dict[Value, Value] = {}  # values that are another, made before the block
    affected = set(leaves)
    for node in graph.nodes.values():
        if affected.isdisjoint(node.inputs):
            continue
        passed = _passed_on(graph, node, cut, affected)
        if passed is None:
            affected.update(node.outputs)
        else:
            same[node.outputs[0]] = same.get(passed, passed)
    if not affected.isdisjoint(graph.outputs):
        raise ArchitectureError(
            f"Block {block!r} cannot be skipped: with all of its parameters at 0 the result still"
            f" depends on it{_where(graph, leaves, affected)}. A block can be skipped that adds to"
            " what it was given, in the same shape (a residual connection)."
        )
    live = _live_sites(graph, same)
    return frozenset(name for name in graph.site_nodes() if name not in live)


def _passed_on(graph: FlatGraph, node: Node, cut: CutValues, affected: set[Value]) -> Value | None:
    """The operand that is the result of an equation whose other operand the block made 0."""
    if node.primitive not in ("add", "add_any", "sub"):
        return None
    one, other = node.inputs
    for kept, added in ((one, other), (other, one)):
        if added is one and node.primitive == "sub":
            continue
        zero = cut.everywhere(added)
        if kept not in affected and zero is not None and zero == 0:
            return kept if graph.shape(kept) == graph.shape(node.outputs[0]) else None
    return None


def _where(graph: FlatGraph, leaves: dict[Value, str], affected: set[Value]) -> str:
    """The first site behind a block that reads what it makes."""
    names = set(leaves.values())
    for name, node in graph.site_nodes().items():
        weight = graph.sites[name].weight
        own = weight is not None and weight.parameter in names
        if not own and not affected.isdisjoint(node.inputs):
            return f" (at site {name!r}, for one)"
    return ""


def _live_sites(graph: FlatGraph, same: dict[Value, Value]) -> set[str]:
    """The sites whose results are used once values that are another are replaced by it."""
    waiting, seen, live = list(graph.outputs), set(), set()
    while waiting:
        value = waiting.pop()
        value = same.get(value, value)
        if value in seen:
            continue
        seen.add(value)
        node = graph.producer.get(value)
        if node is not None:
            waiting.extend(node.inputs)
            if node.site is not None:
                live.add(node.site)
    return live


def checked_blocks(blocks: Sequence[str], depths: Sequence[int]) -> None:
    """Raises ArchitectureError for depths that are no numbers of these blocks."""
    several = isinstance(blocks, Sequence) and all(isinstance(block, str) for block in blocks)
    if isinstance(blocks, str) or not several or len(set(blocks)) != len(blocks) or not blocks:
        raise ArchitectureError(
            f"depths name the blocks {blocks!r}; expected a tuple of distinct ones: ('block3',)."
        )
    depths = depths if isinstance(depths, Sequence) else (depths,)
    whole = [isinstance(depth, (int, np.integer)) for depth in depths]
    wrong = [depth for depth, is_whole in zip(depths, whole) if not is_whole]
    wrong = wrong or [depth for depth in depths if not 0 <= depth <= len(blocks)]
    if wrong or len(set(depths)) < 2:
        raise ArchitectureError(
            f"The depths of blocks {', '.join(blocks)} are {tuple(depths)!r}; expected two or more"
            f" different numbers of blocks to keep, 0 to {len(blocks)}."
        )
