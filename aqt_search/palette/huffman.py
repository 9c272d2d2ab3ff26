"""The size of indices under a Huffman code."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import numpy as np


def huffman_lengths(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Lengths in bits [k], int64, of the symbols' words in an optimal prefix code (Huffman 1952).

        H <= sum_i p_i length_i < H + 1,   H = -sum_i p_i log2 p_i

    A symbol that never occurs has no word: length 0. A symbol that is alone has a word of 1 bit.

    Args:
      counts: [k], how often each symbol occurs.

    Raises:
      ValueError: a count below 0, or no symbol at all.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or (counts < 0).any() or not counts.any():
        raise ValueError(f"A Huffman code needs counts [k] of at least one symbol; got {counts}.")
    lengths = np.zeros(len(counts), np.int64)
    used = np.flatnonzero(counts)
    if len(used) == 1:
        lengths[used] = 1
        return lengths
    order = itertools.count()  # breaks ties between equal counts
    heap = [(int(counts[symbol]), next(order), [symbol]) for symbol in used]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (a + b, next(order), left + right))
    return lengths


def huffman_bits(counts: Sequence[int] | np.ndarray) -> int:
    """Bits of all symbols under their Huffman code, and of the table that a decoder needs.

        sum_i count_i length_i + k ceil(log2 k)

    The table is that of a canonical code: the length of every symbol's word, below k and so of
    ceil(log2 k) bits, at least 1.

    Args:
      counts: [k], how often each symbol occurs.

    Raises:
      ValueError: as `huffman_lengths`.
    """
    counts = np.asarray(counts)
    lengths = huffman_lengths(counts)
    table = len(counts) * max(1, (len(counts) - 1).bit_length())
    return int(np.sum(counts * lengths)) + table
