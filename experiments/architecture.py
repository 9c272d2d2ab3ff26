"""The architecture decisions of a configuration, and the models that a search of them finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from aqt_search.architecture.decisions import KINDS, Times
from aqt_search.architecture.elastic import Elastic, elastic
from aqt_search.architecture.errors import ArchitectureError
from aqt_search.architecture.named_spaces import architecture
from aqt_search.models.fitting import FITTED
from aqt_search.training.storage import as_path
from aqt_search.training.workdir import read_json
from experiments.errors import ConfigError

ARCHITECTURE, FORMATS = "architecture", "formats"  # what a policy.json with both holds

# The kinds of decisions that a phase of a supernet's training may set free.
PHASE_KINDS = (*KINDS, FORMATS)

# By the first word of a rule of `search.architecture`, what stands behind it.
FORMS = {
    "width": "('width', pattern of channel groups, numbers of channels)",
    "expansion": "('expansion', pattern of channel groups, pattern of the group it multiplies,"
    " whole numbers)",
    "window": "('window', pattern of convolutions, odd sizes)",
    "depth": "('depth', names of blocks, how many of them)",
}


def parsed_architecture(rules: Any) -> dict[str, Any]:
    """Keyword arguments of `elastic` of `search.architecture_rules`.

    Raises:
      ConfigError: rules that are none.
    """
    found: dict[str, Any] = {"widths": {}, "kernels": {}, "depths": []}
    rules = _tuples(rules)
    if not isinstance(rules, tuple):
        raise ConfigError(f"these are no rules; they are {'; '.join(FORMS.values())}")
    for rule in rules:
        if not isinstance(rule, tuple) or not rule or rule[0] not in FORMS:
            raise ConfigError(f"{rule!r} is no rule; one is {', or '.join(FORMS.values())}")
        kind, *rest = rule
        if len(rest) != (3 if kind == "expansion" else 2) or not isinstance(rest[-1], tuple):
            raise ConfigError(f"{rule!r} is no rule; expected {FORMS[kind]}")
        if kind == "width":
            found["widths"][rest[0]] = rest[1]
        elif kind == "expansion":
            found["widths"][rest[0]] = Times(rest[1], rest[2])
        elif kind == "window":
            found["kernels"][rest[0]] = rest[1]
        else:
            found["depths"].append((rest[0], rest[1]))
    return found


def _tuples(value: Any) -> Any:
    """With lists as tuples: a configuration that was read from a file has lists."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def configured_net(
    config: ml_collections.ConfigDict, model: Any, image_shape: tuple[int, ...]
) -> Elastic | None:
    """The subnets of `search.architecture`; None where it is empty.

    Raises:
      ConfigError: a space that the model has not, with the site and the reason.
    """
    name, rules = config.search.architecture, config.search.architecture_rules
    if not name and not rules:
        return None
    if not isinstance(model, FITTED):  # or it would fail when all has trained
        raise ConfigError(
            f"config.model.name is {config.model.name!r}, but a job ends with a plain model of the"
            f" architecture it found, which it can build of a MobileNetV2 or MobileNetV3 alone"
            " (without quantizers.companded). Take one of these; a loop of one's own can search any"
            " model by aqt_search.elastic."
        )
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def apply(variables, images):
        return model.apply(variables, images, train=False)

    variables = jax.eval_shape(lambda i: model.init(jax.random.key(0), i, train=False), image)
    try:
        options = architecture(name, model) if name else parsed_architecture(rules)
        return elastic(apply, variables, image, **options)
    except ArchitectureError as error:
        raise ConfigError(
            f"config.search.architecture{'' if name else '_rules'}: {error} The whole model is"
            " built by config.model: windows, expansions, depths, width and form."
        ) from error


def model_json(model: Any) -> dict[str, Any]:
    """What tells a model that was cut out from the configured one: its blocks and channels."""
    names = ("stem_channels", "last_channels", "hidden_channels")
    channels = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return {"blocks": [list(block) for block in model.blocks], **channels}


def model_of(model: Any, told: Mapping[str, Any]) -> Any:
    """The configured model with the blocks and channels that `model_json` told.

    Raises:
      ConfigError: they are not of such a model.
    """
    kind = type(model.blocks[0]) if getattr(model, "blocks", None) else None
    try:
        if kind is None:
            raise TypeError(f"a {type(model).__name__} has no blocks")
        blocks = tuple(kind(*block) for block in told["blocks"])
        channels = {name: value for name, value in told.items() if name.endswith("_channels")}
        return dataclasses.replace(model, blocks=blocks, **channels)
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"The architecture of the policy is not of this model: {error}. Take the policy of a"
            " search with the same config.model."
        ) from error


def choices_of(net: Elastic, told: Mapping[str, Any]) -> np.ndarray:
    """The choices [decisions] that `Elastic.description` told; of what it left out the first.

    Raises:
      ConfigError: they are of another space.
    """
    names = {decision.name: decision for decision in net.decisions}
    for name, option in told.items():
        option = _option(option)
        if name not in names or option not in names[name].options:
            raise ConfigError(
                f"The policy's architecture has {option!r} for {name!r}, which"
                " config.search.architecture does not offer. Give the configuration of the search."
            )
    return np.array([
        decision.options.index(_option(told[decision.name])) if decision.name in told else 0
        for decision in net.decisions
    ])  # fmt: skip


def _option(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def policy_architecture(config: ml_collections.ConfigDict) -> dict[str, Any] | None:
    """The architecture in the file `config.policy`, where there is one."""
    if not config.policy or config.formats:  # of both together it is said elsewhere
        return None
    value = read_policy_file(as_path(config.policy))
    return value.get(ARCHITECTURE) if isinstance(value, Mapping) else None


def read_policy_file(path: Path) -> Any:
    """What a policy.json holds.

    Raises:
      ConfigError: there is no such file.
      WorkdirError: it is not JSON.
    """
    try:
        return read_json(path)
    except OSError as error:
        message = f"Cannot read the policy {path}: {error.strerror}. Give a run's policy.json."
        raise ConfigError(message) from error
