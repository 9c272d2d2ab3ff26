"""Range losses: auxiliary losses under which weights spread evenly over a short range.

A weight of few bits has few steps between its largest values, so a tensor whose largest weight is
ten times its typical one spends them on outliers. R2-Loss (arXiv 2303.08253) adds to the loss of
float training a term that pulls the outliers in:

    loss = range_loss(sites, [("head", None), (".*", margin())])
    state = loss.init(params)                                  # learned margins or temperatures
    total = cross_entropy + 0.01 * loss.apply(params, state)   # differentiate in both

Every loss looks at u = w / rms(w), so that it does not change when all weights of a tensor shrink:
before a BatchNorm that would change nothing but the loss. It is a mean or a maximum, so one
coefficient serves tensors of all sizes. Losses of sites are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aqt_search.tracing.layers import check_whole
from aqt_search.tracing.rules import RuleError, match_rules, rule_pairs
from aqt_search.tracing.sites import Site, parameter_name

_UNIFORM_KURTOSIS = 1.8  # of a uniform distribution


class RangeLoss(NamedTuple):
    """The loss of one tensor, given as u [n] of mean square 1, float32."""

    init: Callable[[jax.Array], dict[str, jax.Array]]  # learned state; {} if there is none
    apply: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]  # scalar


class ModelRangeLoss(NamedTuple):
    """The loss of a model: of its parameters, as `find_sites` was given them or their "params"."""

    init: Callable[[Any], dict[str, Any]]  # {site: learned state}
    apply: Callable[[Any, Mapping[str, Any]], jax.Array]  # scalar, the sum over the sites


def l_inf() -> RangeLoss:
    """max|u| (arXiv 2303.08253, L-inf)."""
    return RangeLoss(lambda u: {}, lambda u, state: jnp.max(jnp.abs(u)))


def margin(share: float = 0.01) -> RangeLoss:
    """|M| + mean(max(|u| - |M|, 0)) / share, with a learned margin M.

    The paper (arXiv 2303.08253, Margin) has the sum in place of the mean over `share`, which grows
    with the tensor; that is a share of 1 / n. Under the best M, which `share` of the |u| exceed,
    the loss is the mean of those largest |u| (Rockafellar and Uryasev 2000). M starts at max|u|.

    Args:
      share: of the weights that are pulled in, 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"margin takes a share above 0 and at most 1; got {share}.")

    def apply(u: jax.Array, state: dict[str, jax.Array]) -> jax.Array:
        m = jnp.abs(state["margin"])
        return m + jnp.mean(jnp.maximum(jnp.abs(u) - m, 0)) / share

    return RangeLoss(lambda u: {"margin": jnp.max(jnp.abs(u))}, apply)


def soft_min_max(temperature: float = 5.0) -> RangeLoss:
    """s_max - s_min + exp(t - |a|), with a learned temperature a that starts at t.

        s_max = sum u e^(a (u - max u)) / sum e^(a (u - max u));  s_min likewise with -a and min u

    A small a pulls in many weights, a large one the largest alone. Both ends are pulled in apart,
    which suits clustering: a palette need not be symmetric. The paper (arXiv 2303.08253,
    Soft-min-max) has t = 0, of weights as they are. The derivative of s_max - s_min in a is the
    variance of u at both ends, 2 for normal u: more than exp(-a) at any a > 0, so that under t = 0
    a would fall to 0, where the loss no longer depends on u. Under t it comes to t - log 2 for
    normal u, and to more where the ends are narrower.

    Args:
      temperature: t, above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"soft_min_max takes a finite temperature above 0; got {temperature}.")

    def apply(u: jax.Array, state: dict[str, jax.Array]) -> jax.Array:
        a = jnp.abs(state["temperature"])
        soft_max, soft_min = (jnp.sum(u * jax.nn.softmax(s * a * u)) for s in (1, -1))
        return soft_max - soft_min + jnp.exp(temperature - a)

    return RangeLoss(lambda u: {"temperature": jnp.float32(temperature)}, apply)


def kurtosis(target: float = _UNIFORM_KURTOSIS) -> RangeLoss:
    """(mean ((u - mean u) / std u)^4 - target)^2: KURE (Chmiel et al. 2020, arXiv 2002.07686).

    Args:
      target: 1.8, that of a uniform distribution, is the paper's.
    """
    if not math.isfinite(target):
        raise ValueError(f"kurtosis takes a finite target; got {target}.")

    def apply(u: jax.Array, state: dict[str, jax.Array]) -> jax.Array:
        centred = u - jnp.mean(u)
        variance = jnp.mean(jnp.square(centred))
        fourth = jnp.mean(jnp.square(jnp.square(centred)))
        return jnp.square(fourth / jnp.maximum(jnp.square(variance), 1e-12) - target)

    return RangeLoss(lambda u: {}, apply)


RANGE_LOSSES = {
    "l_inf": l_inf(),
    "margin": margin(),
    "soft_min_max": soft_min_max(),
    "kurtosis": kurtosis(),
}


def _normalised(w: jax.Array) -> jax.Array:
    """w / rms(w), flat and in float32; zeros stay zeros.

    The largest value is divided out first, so that squares neither overflow nor vanish.
    """
    w = w.reshape(-1).astype(jnp.float32)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(w)))
    w = w / jnp.where(largest > 0, largest, 1.0)
    square = jnp.mean(jnp.square(w))
    # Both branches of the outer where are differentiated: the inner one keeps the root's finite.
    rms = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, w / rms, w)


def _loss_of(spec: RangeLoss | str | None, pattern: str) -> RangeLoss | None:
    if spec is None or isinstance(spec, RangeLoss):
        return spec
    if spec not in RANGE_LOSSES:
        known = ", ".join(RANGE_LOSSES)
        raise RuleError(f"Rule {pattern!r} has the range loss {spec!r}; expected one of {known}.")
    return RANGE_LOSSES[spec]


def range_loss(
    sites: Mapping[str, Site], rules: Iterable[tuple[str, RangeLoss | str | None]]
) -> ModelRangeLoss:
    """The range loss of a model's weights, by rules as `assign` has them.

    A weight is the parameter that a site's operand comes from, before what the model computes on
    the way; stacked layers (`nn.scan`) are tensors of their own. Sites without a weight are left
    out, and a parameter of several sites counts once, as its first site says.

    Args:
      sites: as `find_sites` returns them.
      rules: ordered pairs of pattern and loss: a `RangeLoss`, its name in `RANGE_LOSSES`, or None.

    Raises:
      RuleError: a rule matches no site, is never used or has an unknown loss; or no site with a
        weight gets a loss.
    """
    check_whole(sites, "A range loss")
    rules = rule_pairs(rules)
    taken = match_rules(sites, [pattern for pattern, _ in rules])
    chosen: dict[str, RangeLoss] = {}
    parameters: dict[str, str] = {}
    copies: dict[str, int] = {}
    for (pattern, spec), names in zip(rules, taken):
        loss = _loss_of(spec, pattern)
        for name in names:
            weight = sites[name].weight
            if weight is None or weight.parameter is None:
                continue
            if loss and weight.parameter not in parameters.values():
                chosen[name], parameters[name] = loss, weight.parameter
                copies[name] = weight.copies
    if not chosen:
        raise RuleError("The range loss has no weight to look at: no rule gives a loss to one.")

    def tensors(params: Any) -> dict[str, jax.Array]:
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
        leaves = {parameter_name(path): leaf for path, leaf in flat}
        missing = sorted(set(parameters.values()) - set(leaves))
        if missing:
            raise ValueError(
                f"The parameters have no {missing[0]!r}: give those that find_sites was given."
            )
        stacks = {name: leaves[parameter] for name, parameter in parameters.items()}
        return {
            name: jax.vmap(_normalised)(leaf.reshape(copies[name], -1))
            for name, leaf in stacks.items()
        }

    def init(params: Any) -> dict[str, Any]:
        return {name: jax.vmap(chosen[name].init)(u) for name, u in tensors(params).items()}

    def apply(params: Any, state: Mapping[str, Any]) -> jax.Array:
        found = tensors(params)
        losses = [jax.vmap(chosen[n].apply)(u, state[n]).sum() for n, u in found.items()]
        return jnp.sum(jnp.stack(losses))

    return ModelRangeLoss(init, apply)
