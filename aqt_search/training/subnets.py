"""Training of subnets: a function of points, and averages over the replicas that had a channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from aqt_search.architecture.elastic import Elastic
from aqt_search.search import replicas
from aqt_search.search.space import Point
from aqt_search.training.parallel import AXIS


def of_points(qapply: Callable, net: Elastic | None, matrices: Any = None) -> Callable:
    """`subnet(point, variables, ...)` of `qapply(assignment, variables, ...)`.

    The variables are those of the whole model, of which the subnet sees its own. Where collections
    are mutable, what the subnet has not comes back as it was.

    Args:
      qapply: a quantized function of the whole model, as Flax's `apply`.
      net: its subnets; None: points are assignments, and the function stays as it is.
      matrices: of the kernels, as of `Elastic.variables`.
    """
    if net is None:
        return qapply

    def subnet(point: Point, variables: Any, *args: Any, **kwargs: Any) -> Any:
        own = net.variables(point.architecture, variables, matrices or None)
        outputs = qapply(point.assignment, own, *args, **kwargs)
        if not kwargs.get("mutable"):
            return outputs
        result, updates = outputs
        before = {name: variables[name] for name in updates}
        return result, net.where(point.architecture, updates, before)

    return subnet


def mean_gradients(net: Elastic, point: Point, gradients: Any) -> tuple[Any, Any]:
    """Gradients averaged, element by element, over the replicas whose subnets have it; inside AXIS.

    A plain mean would shrink those of channels that few subnets have.

    Returns:
      (the gradients, by how many replicas an element was had), of the same structure.
    """
    had = net.masks(point.architecture, {"params": gradients})["params"]
    had, total = replicas.total((had, gradients), AXIS)
    return jax.tree.map(lambda g, n: g / jnp.maximum(n, 1), total, had), had


def moved_where_had(had: Any, new: Any, old: Any) -> Any:
    """New parameters where some replica had them: momentum and decay leave the others alone."""
    return jax.tree.map(lambda n, a, b: jnp.where(n > 0, a, b), had, new, old)
