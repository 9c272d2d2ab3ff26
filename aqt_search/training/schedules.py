"""Learning-rate schedules by name, and which parameters weight decay is for."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from aqt_search.numerics.learned_scales import Learned


def _constant(peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


def _cosine(peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, total_steps - warmup_steps)


def _cosine_linear_cooldown(
    peak: float, total_steps: int, warmup_steps: int, *, cooldown_share: float = 0.2
) -> optax.Schedule:
    cooldown_steps = round(cooldown_share * total_steps)
    decay_steps = total_steps - warmup_steps
    if not 0 < cooldown_share <= 1 or not 0 < cooldown_steps <= decay_steps:
        raise ValueError(
            f"cooldown_share is {cooldown_share!r}, {cooldown_steps} of {total_steps} steps; "
            f"expected above 0 and at most the {decay_steps} steps after warm-up"
        )
    cosine = optax.cosine_decay_schedule(peak, decay_steps)
    cooldown = optax.linear_schedule(1.0, 0.0, cooldown_steps, decay_steps - cooldown_steps)
    return lambda step: cosine(step) * cooldown(step)


def _step(
    peak: float,
    total_steps: int,
    warmup_steps: int,
    *,
    drops: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
) -> optax.Schedule:
    steps = [round(share * total_steps) for share in drops]
    if steps != sorted(set(steps)) or not all(warmup_steps < s < total_steps for s in steps):
        raise ValueError(
            f"drops {tuple(drops)!r} are steps {steps} of {total_steps}; expected rising shares of "
            f"the run, after the {warmup_steps} warm-up steps and before the end"
        )
    if not factor > 0:
        raise ValueError(f"factor is {factor!r}; expected a number above 0, such as 0.1")
    return optax.piecewise_constant_schedule(peak, {s - warmup_steps: factor for s in steps})


_AFTER_WARMUP: dict[str, Callable[..., optax.Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "cosine_linear_cooldown": _cosine_linear_cooldown,
    "step": _step,
}


def learning_rate(
    name: str, *, peak: float, total_steps: int, warmup_steps: int = 0, **options: Any
) -> optax.Schedule:
    """Learning rate as a function of the step, counted from 0.

    With w = warmup_steps and T = total_steps, the rate is peak * t / w for t < w, then

    - "constant": peak
    - "cosine": peak * (1 + cos(pi * (t - w) / (T - w))) / 2
    - "cosine_linear_cooldown": the cosine times min(1, (T - t) / c), c = cooldown_share * T.
      The Pareto-ResNet recipe (arXiv 2105.03536) has 5 warm-up and 50 cooldown epochs in 250:
      warmup_steps = 0.02 T, cooldown_share = 0.2.
    - "step": peak * factor ** (drops passed), a drop at each share of T in `drops`

    Args:
        name: one of the above.
        peak: the highest rate.
        total_steps: steps in the run.
        warmup_steps: steps of linear warm-up, fewer than total_steps.
        **options: `cooldown_share` (0.2) of "cosine_linear_cooldown"; `drops` ((0.5, 0.75)) and
            `factor` (0.1) of "step".

    Raises:
        ValueError: unknown name, or a value out of range.
        TypeError: an option that the schedule does not have.
    """
    if name not in _AFTER_WARMUP:
        raise ValueError(
            f"unknown learning-rate schedule {name!r}; known: {', '.join(_AFTER_WARMUP)}"
        )
    if not (0 <= peak < float("inf")):
        raise ValueError(f"peak is {peak!r}; expected a finite rate that is not below 0")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps!r}; expected at least 1")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps!r}; expected at least 0 and fewer than the "
            f"{total_steps} steps of the run"
        )
    schedule = _AFTER_WARMUP[name](peak, total_steps, warmup_steps, **options)
    if warmup_steps == 0:
        return schedule
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, schedule], [warmup_steps])


def weight_decay_mask(params: Any) -> Any:
    """True for the leaves weight decay is for: kernels, not biases nor normalisation scales.

    A leaf is decayed if it has at least two axes and is not named "bias" or "scale"; the name
    matters where a stacked layer (`nn.scan`) gives its biases a leading axis. Learned scales of
    quantizers are not decayed. Takes the place of
    `mask` in `optax.add_decayed_weights` and `optax.adamw`.

    Args:
        params: pytree of arrays.

    Returns:
        Pytree of the same structure with bool leaves; one for a learned scale as a whole.
    """

    def decayed(path: tuple, leaf: Any) -> bool:
        if isinstance(leaf, Learned):
            return False
        last = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim >= 2 and last not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(
        decayed, params, is_leaf=lambda node: isinstance(node, Learned)
    )
