"""Running BatchNorm statistics, and the batch's own values behind an update of them.

A running statistic follows `new = m * old + (1 - m) * batch`. Its momentum m is found from outside
of the model, so that no module needs to tell it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def running_momentum(update: Callable, batch_stats: Any, batch: Any) -> Any:
    """The momentum m of every running statistic: m = (new(old=c) - new(old=0)) / c.

    Args:
      update: `update(batch_stats, batch)` gives the new running statistics; any batch will do.
      batch_stats: running statistics, of which only the shapes matter.
      batch: passed on.

    Returns:
      A pytree like `batch_stats`.
    """
    from_zero = update(jax.tree.map(jnp.zeros_like, batch_stats), batch)
    # As large as the statistic, so that the difference keeps its digits.
    old = jax.tree.map(lambda s: jnp.maximum(jnp.abs(s), 1.0), from_zero)
    return jax.tree.map(lambda new, zero, c: (new - zero) / c, update(old, batch), from_zero, old)


def batch_statistics(from_zero: Any, momentum: Any) -> Any:
    """The statistics of the batch that turned running statistics of zero into `from_zero`.

    batch = new(old=0) / (1 - m). From zero, because beside a large old value the digits of a small
    variance are lost, and what is left of it may be negative.
    """
    return jax.tree.map(lambda new, m: new / (1 - m), from_zero, momentum)
