"""Calibrations with state in training: their state is one more collection of variables, "scales".

qapply = with_scales(quantize_with_state(model.apply, axis_name=AXIS))
logits, updates = qapply(assignment, {"params": ..., "batch_stats": ..., "scales": ...}, images,
                         train=True, mutable=["batch_stats", "scales"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aqt_search.numerics.learned_scales import merge_learned, split_learned
from aqt_search.tracing.transform import StatefulFunction
from aqt_search.training.parallel import AXIS

SCALES = "scales"


def with_scales(fun: StatefulFunction) -> Callable:
    """`qapply(assignment, variables, *args, mutable=(), **kwargs)`, after Flax's manner.

    With "scales" among `mutable` the calibrations look at the tensors, and their next state is
    among the updates; otherwise bounds are read from the state alone. Variables without scales
    serve assignments whose calibrations have no state.
    """

    def qapply(
        assignment: Any, variables: Mapping[str, Any], *args: Any, mutable: Sequence[str] = (), **kw
    ):
        scales = variables.get(SCALES, {})
        own = {name: value for name, value in variables.items() if name != SCALES}
        inner = [name for name in mutable if name != SCALES]
        if inner:
            kw["mutable"] = inner
        if SCALES not in mutable:
            return fun.evaluate(assignment, scales, own, *args, **kw)
        outputs, scales = fun.apply(assignment, scales, own, *args, **kw)
        outputs, updates = outputs if inner else (outputs, {})
        return outputs, {**updates, SCALES: scales}

    return qapply


def batch_arguments(variables: Mapping[str, Any], dropout_key: jax.Array) -> dict[str, Any]:
    """Arguments under which statistics and bounds are those of the batch at hand.

    With "mutable" among them the function returns its output in a pair. A model with BatchNorm has
    dropout on; one without is evaluated as ever.
    """
    own = [name for name in ("batch_stats", SCALES) if jax.tree.leaves(variables.get(name, ()))]
    arguments: dict[str, Any] = {"mutable": own} if own else {}
    if "batch_stats" in own:
        return {"train": True, "rngs": {"dropout": dropout_key}, **arguments}
    return {"train": False, **arguments}


def with_learned(scales: Any, trained: Any) -> Any:
    """Scales whose learned part, where `trained` has one, is its; all else stays.

    Args:
      scales: states by site and operand, of all calibrations.
      trained: the same of some or all of them.
    """

    def merged(new: Any, old: Any) -> Any:
        return merge_learned(split_learned(old)[0], split_learned(new)[1])

    return {
        name: {
            side: merged(state, trained[name][side]) if side in trained.get(name, {}) else state
            for side, state in sides.items()
        }
        for name, sides in scales.items()
    }


def synchronized(old: Any, new: Any) -> Any:
    """The scales after a step, the same on all replicas, whose formats may differ.

    A learned value changes in the step's forward pass only where it was 0, not yet set: there the
    largest of the replicas' counts. What else is remembered is averaged.
    """
    old_learned, _ = split_learned(old)
    learned, rest = split_learned(new)
    learned = jax.tree.map(
        lambda before, after: jnp.where(before == 0, jax.lax.pmax(after, AXIS), before),
        old_learned,
        learned,
    )

    def shared(leaf: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return (jax.lax.pmean if floating else jax.lax.pmax)(leaf, AXIS)

    return merge_learned(learned, jax.tree.map(shared, rest))
