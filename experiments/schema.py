"""The typed schema of a configuration: what every key may be, checked before anything is read.

    check(config)                # ConfigError: config.batch_size is 0; expected a whole number ...

A row of `SCHEMA` says what the value of a key is and gives an example. Rules, and changes of other
keys within `sweep`, are looked into. `check` then asks what keys have to be together. What depends
on the data or on the sites of the model is the jobs' to say.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ml_collections

from aqt_search.architecture.decisions import KINDS
from aqt_search.architecture.named_spaces import NAMED_SPACES
from aqt_search.models import MODELS
from aqt_search.models.classifier import ACTIVATIONS
from aqt_search.numerics import by_name
from aqt_search.numerics.formats import numeric_format
from aqt_search.numerics.quantizer import operand_spec
from aqt_search.palette.rules import palette_of
from aqt_search.products.derivatives import RESIDUALS
from aqt_search.search.options import Choice, parsed_rule
from aqt_search.search.searchers import SEARCHERS
from aqt_search.search.space import DECIDE
from aqt_search.tracing.rules import compiled_pattern, parsed_formats, rule_pairs
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.schedules import learning_rate
from aqt_search.training.sensitivity import FLOAT
from aqt_search.weights.range_loss import RANGE_LOSSES
from experiments.architecture import PHASE_KINDS, parsed_architecture
from experiments.configured_search import NAMED_CONTROLS, check_controls, cost_names
from experiments.from_config import JUDGED_SPLITS, ConfigError, build_model, cost_function
from experiments.kinds import (
    Kind,
    accepted,
    demand,
    either,
    flag,
    in_range,
    is_tuple,
    number,
    one_of,
    require,
    require_part,
    several,
    text,
    whole,
)
from experiments.option_values import SCORES, VALUES
from experiments.ptq_steps import STEPS, check_steps
from experiments.quantizers import configured_quantizers


def rules(
    what: str, check_spec: Callable[[str, Any], None], example: tuple, least: int = 0
) -> Kind:
    """Ordered (pattern, what holds) rules; `check_spec(pattern, what holds)` looks at a rule."""

    def check(value: Any) -> None:
        pairs = rule_pairs(value)
        demand(len(pairs) >= least)
        for pattern, spec in pairs:
            compiled_pattern(pattern)
            check_spec(pattern, spec)

    return Kind(f"a tuple of pairs (pattern, {what}), a comma behind each", example, check)


def _check_formats(pattern: str, spec: Any) -> None:
    parsed_formats(spec)


def _check_choice(pattern: str, spec: Any) -> None:
    """A rule of a space: options to choose from, or formats that are fixed."""
    parsed = parsed_rule(pattern, spec)
    if not isinstance(parsed, Choice):
        parsed_formats(parsed)
        return
    for column in range(max(map(len, parsed.options.values()))):
        parsed_formats(parsed.spec(column))


def _check_palette(pattern: str, spec: Any) -> None:
    palette_of(spec, pattern)


def _check_range_loss(pattern: str, spec: Any) -> None:
    require_part(f"the loss of {pattern!r}", spec, one_of((*RANGE_LOSSES, None)))


# --- The keys of a sweep --------------------------------------------------------------------------


def known_key(key: Any, fixed: Collection[str] = ()) -> str:
    """The key, if a configuration has it and it may be changed.

    Raises:
      ValueError: it has no such key, or it stands in `fixed` (whole sections, too).
    """
    if key not in SCHEMA:
        hint = near(key) or ": configs/base.py lists them"
        raise ValueError(f"a configuration has no key {key!r}{hint}")
    if any(key == name or key.startswith(f"{name}.") for name in fixed):
        raise ValueError(f"{key} is not to be changed here")
    return key


def near(key: Any) -> str:
    """A question whether one of the keys that are spelled alike was meant; "" where none is."""
    alike = difflib.get_close_matches(str(key), SCHEMA, n=2)
    return f"; did you mean {' or '.join(alike)}?" if alike else ""


def changes(fixed: Collection[str]) -> Kind:
    """Values of other keys, which are of these keys' kinds."""

    def check(value: Any) -> None:
        demand(isinstance(value, Mapping))
        for key, changed in value.items():
            require_part(key, changed, SCHEMA[known_key(key, fixed)])

    return Kind("a mapping of keys to values", {"epochs": 2.0}, check)


def _check_phase(value: Any) -> None:
    """One entry of `supernet.phases`."""
    demand(is_tuple(value, 2, 2))
    require_part("its share", value[0], number(0.25, above=0, most=1))
    require_part("its kinds", value[1], several(one_of(PHASE_KINDS), least=1))


def _check_axis(value: Any) -> None:
    """One (key, values) of `sweep.grid`."""
    demand(is_tuple(value, 2, 2) and is_tuple(value[1], 1))
    key, choices = value
    known_key(key, ("seed", "series", "formats", "search.target", "sweep"))
    for choice in choices:
        require_part(key, choice, SCHEMA[key])


def _check_baseline(value: Any) -> None:
    """One entry of `sweep.baselines`."""
    if isinstance(value, str):
        return FLOAT_OR_FORMAT.check(value)
    demand(is_tuple(value, 2, 3))
    require_part("its name", value[0], NAME)
    require_part("its formats", value[1], FORMATS)
    for changed in value[2:]:
        require_part("its changes", changed, changes(("seed", "series", "formats", "sweep")))


def _check_space(value: Any) -> None:
    """One entry of `sweep.spaces`."""
    demand(is_tuple(value, 2, 2))
    require_part("its name", value[0], NAME)
    require_part("its changes", value[1], changes(("seed", "series", "search.target", "sweep")))


def _check_stage(value: Any) -> None:
    """One entry of `sweep.stages`."""
    demand(is_tuple(value, 3, 4))
    require_part("its name", value[0], NAME)
    require_part("its job", value[1], one_of(("train", "ptq", "palettize")))
    fixed = ("seed", "series", "model", "data", "checkpoint", "sweep")
    require_part("its changes", value[2], changes(fixed))
    for baselines in value[3:]:
        require_part("its baselines", baselines, several(NAME, least=1))


def _check_resources(value: Any) -> None:
    """What Ray takes: parts of a device, or whole ones."""
    demand(is_tuple(value) and all(is_tuple(pair, 2, 2) for pair in value))
    names = [name for name, _ in value]
    for name, amount in value:
        demand(isinstance(name, str) and name.isprintable() and bool(name.strip()))
        require_part(f"its amount of {name}", amount, number(1, least=0))
        demand(amount <= 1 or amount == int(amount))
    demand(len(set(names)) == len(names))


def _check_name(value: Any) -> None:
    demand(isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= 100)
    demand("/" not in value and not value.startswith("."))


def _check_bound(value: Any) -> None:
    """One (site, max|x|) of `ptq.other_bounds`."""
    demand(is_tuple(value, 2, 2) and isinstance(value[0], str))
    require_part("its bound", value[1], number(1.0, above=0))


def _check_further_cost(value: Any) -> None:
    """One (cost, target, relative_to) of `search.further_costs`."""
    demand(is_tuple(value, 3, 3))
    for what, part, kind in zip(("cost", "target", "relative_to"), value, (COST, TARGET, RELATIVE)):
        require_part(f"its {what}", part, kind)


def _check_held_out(value: Any) -> None:
    """A share, or a number of images; flags give that as a float, too."""
    if not in_range(0, None, 1, 1)(value):
        COUNT.check(int(value) if isinstance(value, float) and value.is_integer() else value)
        demand(value > 1)


def _check_shares(value: Any) -> None:
    """() or two shares of an area."""
    demand(is_tuple(value, 0, 2) and len(value) != 1)
    for share in value:
        require_part("a share", share, number(0.08, above=0, most=1))
    demand(list(value) == sorted(value))


# --- The schema -----------------------------------------------------------------------------------

COUNT = whole(100, above=0)
SEED = whole(0, least=0, most=2_000_000_000)  # streams add numbers of their own to it
BATCH = whole(64, above=0, most=100_000)
RATE = number(0.1, least=0)
WEIGHT = number(1.0, least=0)
SHARE = number(0.25, least=0, below=1)
TARGET = number(1.1, least=0)
WORKDIR = text("the workdir of a finished run", "runs/float")
NAME = Kind("a name that a folder can have", "w4a8", _check_name)
FORMAT = accepted(operand_spec, "a format", "int4")
FLOAT_OR_FORMAT = either(one_of((FLOAT,)), FORMAT)
RELATIVE = either(one_of(("", "int4")), FORMAT)
COST = accepted(cost_function, "a cost", "gbops")
FORMATS = rules("formats", _check_formats, ((".*", "int4"),))
CALIBRATION = accepted(by_name.named_calibration, "a calibration", "percentile(99.9)")
GRADIENT = accepted(by_name.named_gradient_rule, "a gradient rule", "ewgs(0.001)")

SCHEMA: Mapping[str, Kind] = {
    "seed": SEED,
    "series": text("a name of a front", "resnet8"),
    "model.name": one_of(MODELS),
    "model.form": text("a form of the network", "cifar"),
    "model.width": number(1.0, above=0, most=100),
    "model.windows": several(whole(3, above=0, most=1000), example=(5,)),
    "model.expansions": several(whole(6, above=0, most=1000), example=(6,)),
    "model.depths": several(whole(2, above=0, most=1000), example=(1, 2, 2, 1)),
    "model.activation": one_of(("", *ACTIVATIONS)),
    "model.dtype": one_of(("float32", "bfloat16", "float16")),
    "data.name": text("digits, folder:PATH or a TFDS name", "folder:/path/to/images", empty=False),
    "data.data_dir": text("a folder", "/path/to/tensorflow_datasets"),
    "data.image_size": whole(224, least=0, most=2048),
    "data.held_out": Kind(
        "a share, at least 0 and below 1, or a whole number of images above 1", 0.1, _check_held_out
    ),
    "data.folds": either(one_of((0, 3)), whole(3, above=1, most=1000)),
    "data.crop_fraction": number(0.875, least=0, most=1),
    "data.crop_area": Kind("() or two rising shares of an area", (0.08, 1.0), _check_shares),
    "data.crop_padding": whole(4, least=0, most=256),
    "data.flip": flag(),
    "data.workers": whole(8, least=0, most=1024),
    "data.threads": whole(8, least=0, most=1024),
    "data.prefetch": whole(4, least=0, most=1024),
    "batch_size": BATCH,
    "epochs": number(10.0, above=0, most=1e6),
    "label_smoothing": SHARE,
    "residuals": one_of(RESIDUALS),
    "optimizer.name": accepted(lambda name: make_optimizer(name, 0.1), "an optimizer", "sgd"),
    "optimizer.learning_rate": RATE,
    "optimizer.schedule": accepted(
        lambda name: learning_rate(name, peak=0.1, total_steps=100), "a schedule", "cosine"
    ),
    "optimizer.warmup_epochs": number(1.0, least=0),
    "optimizer.momentum": SHARE,
    "optimizer.nesterov": flag(),
    "optimizer.weight_decay": number(1e-4, least=0),
    "optimizer.gradient_clip": number(1.0, least=0),
    "range_loss.rules": rules("range loss", _check_range_loss, ((".*", "margin"),)),
    "range_loss.weight": WEIGHT,
    "quantizers.weight": CALIBRATION,
    "quantizers.activation": CALIBRATION,
    "quantizers.weight_gradient": GRADIENT,
    "quantizers.activation_gradient": GRADIENT,
    "quantizers.weight_granularity": accepted(
        functools.partial(by_name.named_granularity, role="weight"), "a granularity", "block(32)"
    ),
    "quantizers.activation_granularity": accepted(
        functools.partial(by_name.named_granularity, role="activation"), "a granularity", "token"
    ),
    "quantizers.companded": several(accepted(compiled_pattern, "a pattern of sites", ".*")),
    "evaluation.batch_size": BATCH,
    "evaluation.calibration_batches": whole(50, least=0),
    "evaluation.train_images": whole(1000, least=0),
    "log_every": COUNT,
    "checkpoint_every": COUNT,
    "formats": FORMATS,
    "checkpoint": WORKDIR,
    "policy": text("a file", "runs/search/policy.json"),
    "ptq.steps": several(one_of(STEPS)),
    "ptq.images": COUNT,
    "ptq.batch_size": BATCH,
    "ptq.adaround_steps": COUNT,
    "ptq.smoothing": number(0.5, least=0, most=1),
    "ptq.data_free": flag(),
    "ptq.other_bounds": several(Kind("a pair (site, max|x|)", ("stem/kernel", 2.5), _check_bound)),
    "sensitivity.checkpoint": WORKDIR,
    "sensitivity.formats": several(
        accepted(numeric_format, "a format", "int4"), least=1, example=("int2", "int4")
    ),
    "sensitivity.reference": either(one_of((FLOAT,)), accepted(numeric_format, "a format", "int4")),
    "sensitivity.images": COUNT,
    "sensitivity.split": one_of(JUDGED_SPLITS),
    "sensitivity.chunk": BATCH,
    "searchers.checkpoint": WORKDIR,
    "searchers.names": several(one_of((*SEARCHERS, SCORES)), least=1),
    "searchers.evaluations": COUNT,
    "searchers.images": whole(1000, least=2),
    "allocate.targets": several(TARGET, least=1),
    "allocate.uniform": several(FORMAT),
    "allocate.by": one_of(VALUES),
    "search.space": rules(
        "formats to choose from", _check_choice, ((".*", ("int4", "int8")),), least=1
    ),
    "search.decide": one_of(DECIDE),
    "search.architecture": one_of(("", *NAMED_SPACES)),
    "search.architecture_rules": Kind(
        "a tuple of rules, a comma behind each",
        (("width", "^last/", (64, 128)),),
        parsed_architecture,
    ),
    "search.warm_up": SHARE,
    "search.warm_up_kinds": several(one_of(KINDS), least=1, example=KINDS),
    "search.score_images": COUNT,
    "search.cost": COST,
    "search.target": TARGET,
    "search.relative_to": RELATIVE,
    "search.further_costs": several(
        Kind("(cost, target, relative_to)", ("weight_bytes", 1.0, "int4"), _check_further_cost)
    ),
    "search.tolerance": number(0.02, least=0),
    "search.beta": WEIGHT,
    "search.held_out_batch_size": BATCH,
    "search.samples": whole(2, above=0, most=10_000),
    "search.cost_samples": either(one_of((0, 256)), whole(256, above=1, most=1_000_000)),
    "search.delay": SHARE,
    "search.learning_rate": RATE,
    "search.baseline_momentum": SHARE,
    "search.entropy_weight": number(0.1, least=0),
    "search.temperature": number(1.0, above=0),
    **{f"search.{name}": one_of(names) for name, names in NAMED_CONTROLS.items()},
    "supernet.subnets": whole(2, least=0, most=64),
    "supernet.distillation": WEIGHT,
    "supernet.kernel_matrices": flag(),
    "supernet.phases": several(
        Kind("(share, kinds of decisions)", (0.25, ("window", "formats")), _check_phase)
    ),
    "subnets.checkpoint": WORKDIR,
    "subnets.samples": whole(300, least=20, most=5000),
    "subnets.images": COUNT,
    "subnets.evaluations": whole(20000, least=100, most=10_000_000),
    "subnets.points": whole(6, above=0, most=1000),
    "subnets.target": number(1.1, least=0),
    "sweep.seeds": several(SEED, least=1, example=(0, 1, 2)),
    "sweep.grid": several(Kind("a pair (key, values)", ("model.width", (0.5, 1.0)), _check_axis)),
    "sweep.baselines": several(
        Kind(
            "'float', a format, (name, rules) or (name, rules, changes of keys)",
            ("mine", ((".*", "int4"),)),
            _check_baseline,
        ),
        example=("float", "int4", ("mine", ((".*", "int4"),))),
    ),
    "sweep.targets": several(TARGET),
    "sweep.spaces": several(
        Kind("(name, changes of keys)", ("blocks", {"search.decide": "block"}), _check_space)
    ),
    "sweep.retrain": flag(),
    "sweep.stages": several(
        Kind(
            "(name, job, changes of keys) or (name, job, changes, baselines)",
            ("w4a8", "ptq", {"quantizers.weight": "mse"}),
            _check_stage,
        )
    ),
    "sweep.sensitivity": text("the name of a baseline", "int8"),
    "sweep.side_by_side": flag(),
    "sweep.engine": one_of(("local", "ray")),
    "sweep.resources": Kind(
        "a tuple of pairs (resource, amount), each once, whole where above 1",
        (("CPU", 1), ("GPU", 1)),
        _check_resources,
    ),
    "sweep.ray_address": text("auto, local or HOST:PORT", "10.0.0.1:6379", empty=False),
    "sweep.ray_retries": whole(10, least=0, most=1_000_000),
    "palette.rules": rules("bits of an index", _check_palette, ((".*", 2),), least=1),
    "palette.restarts": whole(3, above=0, most=1000),
    "palette.epochs": number(1.0, least=0, most=1e6),
    "palette.learning_rate": number(0.01, above=0),
    "palette.temperature": number(0.05, above=0),
    "palette.iterations": whole(3, above=0, most=1000),
}


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the whole of a configuration: every key, and what keys have to be together.

    Raises:
      ConfigError, FormatError, PaletteError, RuleError, SpaceError: as `check_values`, or values
        that do not go together.
    """
    check_values(config)
    _check_together(config)


def check_values(config: ml_collections.ConfigDict) -> None:
    """Checks every key for itself: that of a sweep, whose points have others for some.

    Raises:
      ConfigError: an unknown or missing key, or a value that cannot be.
      FormatError, PaletteError, RuleError, SpaceError: likewise, by what is in a value.
    """
    values = flat(config)
    for key in values:
        try:
            known_key(key)
        except ValueError as error:
            raise ConfigError(f"config.{key}: {error}.") from error
    for key, kind in SCHEMA.items():
        if key not in values:
            raise ConfigError(
                f"config.{key} is missing; expected {kind.expected}, such as {kind.example!r}. Make"
                " a configuration from configs/base.py."
            )
        require(f"config.{key}", values[key], kind)


def _check_together(config: ml_collections.ConfigDict) -> None:
    warmup, epochs = config.optimizer.warmup_epochs, config.epochs
    if warmup and warmup >= epochs:
        raise ConfigError(
            f"config.epochs is {epochs}, but config.optimizer.warmup_epochs (that of the file, if"
            f" it was not given) is {warmup}; expected fewer than the epochs. Set both, such as"
            f" --config.epochs={epochs} --config.optimizer.warmup_epochs={epochs / 4:g}."
        )
    build_model(config, 10, None)
    configured_quantizers(config)
    check_steps(config.ptq.steps, config.ptq.data_free)
    cost_names(config)
    check_controls(config)
    _check_architecture(config.search)
    shares = [share for share, _ in config.supernet.phases]
    if sum(shares) >= 1:
        raise ConfigError(
            f"The shares of config.supernet.phases are {shares}; expected a sum below 1, as in the"
            " rest of the run all decisions are free."
        )


def _check_architecture(search: ml_collections.ConfigDict) -> None:
    if search.architecture and search.architecture_rules:
        raise ConfigError(
            "config.search has both architecture and architecture_rules; expected one of them."
        )
    has_one = bool(search.architecture or search.architecture_rules)
    if has_one and search.searcher in VALUES and search.further_costs:
        raise ConfigError(
            f"config.search.searcher {search.searcher!r} decides about the architecture under one"
            f" cost, but search.further_costs is {search.further_costs}: leave it empty, or set"
            " search.searcher to 'critic'."
        )


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values of a configuration by keys such as "search.target"."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            found |= {f"{key}.{inner}": v for inner, v in flat(value).items()}
        else:
            found[key] = value
    return found


_PATHS = (
    "data.data_dir", "checkpoint", "policy", "sensitivity.checkpoint", "searchers.checkpoint",
    "subnets.checkpoint",
)  # fmt: skip


def with_homes(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy in which a ~ at the start of a path is the home folder, as in a shell."""
    copy = config.copy_and_resolve_references()
    paths = {key: os.path.expanduser(value) for key, value in flat(config).items() if key in _PATHS}
    kind, colon, path = config.data.name.partition(":")
    paths["data.name"] = kind + colon + os.path.expanduser(path)
    copy.update_from_flattened_dict(paths)
    return copy
