"""Builds the parts of a run from a configuration: data, model, optimizer and schedule of steps."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

import aqt_search as aqs
from aqt_search import data, models
from aqt_search.architecture.elastic import Elastic
from aqt_search.products.carriers import holding
from aqt_search.tracing.rules import match_rules
from aqt_search.training import train_step
from aqt_search.training.loop import Schedule
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.parallel import AXIS, data_shard, replica_count
from aqt_search.training.scales import with_scales
from aqt_search.training.schedules import learning_rate
from aqt_search.training.train_step import TrainState, init_train_state
from aqt_search.weights.dorefa import companded_model
from aqt_search.weights.range_loss import ModelRangeLoss, range_loss
from experiments.architecture import model_of, policy_architecture
from experiments.cached_images import on_this_machine
from experiments.errors import ConfigError

# Streams of one run draw from the same seed; these keep their orders apart.
_REWARD_SEED_OFFSET, _STATISTICS_SEED_OFFSET = 1_000_003, 2_000_003
_MOST_STEPS = 2**31 - 1  # of a counter in int32
# Keys of how images are read, whose values change nothing of what is read.
HOW_READ = ("data.data_dir", "data.workers", "data.threads", "data.prefetch")
JUDGED_SPLITS = ("reward", "train")  # what choices may be judged by: test images choose nothing


@contextlib.contextmanager
def checked_values(section: str) -> Iterator[None]:
    """Turns a complaint about a value that came from `config.<section>` into a ConfigError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(f"In config.{section}: {error}") from error


def refuse_unread(config: ml_collections.ConfigDict, keys: Sequence[str], why: str) -> None:
    """Raises ConfigError where a key is set that a job does not read, and says why it does not."""
    for key in keys:
        if config[key]:
            raise ConfigError(f"config.{key} is {config[key]!r}, but {why}. Leave it empty.")


class Images(NamedTuple):
    """A data set with the statistics that normalise it."""

    splits: data.Splits
    mean: np.ndarray  # [C]
    std: np.ndarray  # [C]


class Parts(NamedTuple):
    """What `experiments.train` and `experiments.search` have in common."""

    images: Images
    model: Any  # for training: BatchNorm statistics are shared over the replicas
    sites: dict[str, aqs.Site]
    optimizer: optax.GradientTransformation
    schedule: Schedule
    range_loss: ModelRangeLoss | None


def load_images(config: ml_collections.ConfigDict) -> Images:
    """Opens the data set (preparing it the first time), with its mean and deviation.

    Raises:
      DataError: it cannot be read, or not be copied from a bucket.
    """
    config = on_this_machine(config)
    options = {"max_decoded_bytes": 0} if config.data.crop_area else {}
    splits = data.open_splits(
        config.data.name,
        data_dir=config.data.data_dir or None,
        image_size=config.data.image_size or None,
        crop_fraction=config.data.crop_fraction or None,
        held_out=config.data.held_out,
        seed=config.seed,
        folds=config.data.folds,
        **options,
    )
    return Images(splits, *data.channel_statistics(splits.train, file=splits.statistics_file))


def readers(config: ml_collections.ConfigDict) -> data.Readers:
    """Who makes the batches of a long stream."""
    return data.Readers(config.data.workers, config.data.threads or None, config.data.prefetch)


def available(key: str, wanted: int, there: int, what: str) -> int:
    """How many of `wanted` images there are; says so where that is fewer.

    Args:
      key: of the configuration, whose value is `wanted`.
      what: the images, in words.
    """
    if wanted > there:
        logging.warning("%s is %d, but there are %d %s: all are used.", key, wanted, there, what)
    return min(wanted, there)


def equal_batches(count: int, largest: int) -> tuple[int, int]:
    """(number, size) of equal batches of at most `largest`, for nearly all of `count` images."""
    number = math.ceil(count / largest)
    return number, count // number


def build_model(config: ml_collections.ConfigDict, classes: int, axis_name: str | None) -> Any:
    """The configured model. Raises ConfigError for an unknown name or a value it cannot have."""
    more = {"activation": config.model.activation} if config.model.activation else {}
    taken = inspect.signature(models.MODELS.get(config.model.name, models.build)).parameters
    for key in ("windows", "expansions", "depths"):
        if config.model[key] and key not in taken and config.model.name in models.MODELS:
            raise ConfigError(
                f"config.model.{key} is {config.model[key]!r}, but {config.model.name} has no such"
                " choice: leave it empty, or take a MobileNetV2 or MobileNetV3."
            )
        if config.model[key]:
            values = tuple(config.model[key])
            more[key] = values[0] if len(values) == 1 and key != "depths" else values
    with checked_values("model"):
        return models.build(
            config.model.name,
            classes,
            form=config.model.form,
            width=config.model.width,
            dtype=jnp.dtype(config.model.dtype),
            axis_name=axis_name,
            **more,
        )


def cost_function(name: str) -> Callable:
    """cost(sites, assignment) by the name of `config.search.cost`.

    Raises:
      ConfigError: unknown name.
    """
    if name == "gbops":
        return aqs.cost.gbops
    if name == "weight_bytes":
        return aqs.cost.weight_bytes
    kind, _, chip = name.partition("/")
    if kind == "latency_ms" and chip in aqs.roofline.CHIPS:
        return functools.partial(aqs.roofline.latency_ms, chip=chip)
    known = ["gbops", "weight_bytes", *(f"latency_ms/{chip}" for chip in aqs.roofline.CHIPS)]
    raise ConfigError(f"Unknown cost {name!r}: expected one of {', '.join(known)}.")


def abstract_variables(model: Any, image_shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of a model's variables."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda i: model.init(jax.random.key(0), i, train=False), image)


def model_sites(model: Any, image_shape: tuple[int, ...]) -> dict[str, aqs.Site]:
    """The sites of one image's forward pass."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = abstract_variables(model, image_shape)
    return aqs.find_sites(model.apply, variables, image, train=False)


def steps_per_epoch(config: ml_collections.ConfigDict, images: Images) -> int:
    """Full batches in the training images."""
    return len(images.splits.train) // config.batch_size


def total_steps(config: ml_collections.ConfigDict, images: Images) -> int:
    """Steps of a training run, at least one."""
    return max(1, math.ceil(config.epochs * steps_per_epoch(config, images)))


def check_devices(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for batches that do not fit the devices."""
    for key, size in (
        ("batch_size", config.batch_size),
        ("search.held_out_batch_size", config.search.held_out_batch_size),
    ):
        if size % replica_count():
            raise ConfigError(
                f"{key} {size} cannot be divided over {replica_count()} devices: choose a"
                " multiple of their number."
            )


def build_parts(
    config: ml_collections.ConfigDict,
    images: Images,
    *,
    axis_name: str | None = AXIS,
    architecture: Mapping[str, Any] | None = None,
) -> Parts:
    """Builds everything but the step.

    Args:
      config: of a run.
      images: its data set.
      axis_name: of the mapped axis that batches are sharded over.
      architecture: of a finished run, as `finished_run.load` tells; None: that of `config.policy`,
        or else of `config.model`.

    Raises:
      ConfigError: values do not fit together.
    """
    check_devices(config)
    model = build_model(config, images.splits.num_classes, axis_name)
    found = policy_architecture(config) if architecture is None else architecture
    model = model if found is None else model_of(model, found)
    epoch = steps_per_epoch(config, images)
    total = total_steps(config, images)
    if total > _MOST_STEPS:
        raise ConfigError(f"epochs is {config.epochs}: {total} steps are more than can be counted.")
    if images.splits.num_classes < 2:
        raise ConfigError(f"{config.data.name} has one class; expected images of two or more.")
    with checked_values("optimizer"):
        rate = learning_rate(
            config.optimizer.schedule,
            peak=config.optimizer.learning_rate,
            total_steps=total,
            warmup_steps=round(config.optimizer.warmup_epochs * epoch),
        )
        optimizer = make_optimizer(
            config.optimizer.name,
            rate,
            momentum=config.optimizer.momentum,
            nesterov=config.optimizer.nesterov,
            weight_decay=config.optimizer.weight_decay,
            gradient_clip=config.optimizer.gradient_clip,
        )
    sites = model_sites(model, images.splits.image_shape)
    patterns = config.quantizers.companded
    if patterns:
        with checked_values("quantizers"):
            names = itertools.chain(*match_rules(sites, patterns))
            model = companded_model(model, sites, names)
    schedule = Schedule(total, config.log_every, config.checkpoint_every, epoch)
    rules = config.range_loss.rules
    with checked_values("range_loss"):
        loss = range_loss(sites, rules) if rules else None
    return Parts(images, model, sites, optimizer, schedule, loss)


_SIGNED = tuple(aqs.numeric_format(f"int{bits}") for bits in range(2, 9))
_NARROW = (*_SIGNED, *map(aqs.numeric_format, ("uint8", "e4m3", "e5m2", "bf16")))


def formats_like(assignment: Mapping[str, aqs.SiteFormats]) -> tuple[aqs.NumericFormat, ...]:
    """Formats among which, or narrower than which, those of an assignment are.

    The same ones for many assignments, so that these share a program: all signed integers of 8 bits
    or fewer; all formats of 8 bits or fewer and bf16; none where there are wider ones.
    """
    specs = [spec for formats in assignment.values() for spec in formats if spec is not None]
    known = [aqs.quantizer(spec).fmt for spec in specs]
    if all(fmt in _SIGNED for fmt in known):
        return _SIGNED
    return _NARROW if all(holding([*_NARROW, fmt]) for fmt in known) else ()


def quantized(
    model: Any,
    axis_name: str | None = None,
    *,
    residuals: str = "values",
    formats: Sequence[aqs.NumericFormat] = (),
) -> Callable:
    """The model's function under an assignment, the states of calibrations among its variables.

    Args:
      model: the network.
      axis_name: as in `quantize`, and `residuals`, too.
      formats: that those of assignments, which are traced, are among.
    """
    stateful = aqs.quantize_with_state(
        model.apply, axis_name=axis_name, residuals=residuals, options=formats
    )
    return with_scales(stateful)


def initial_state(
    config: ml_collections.ConfigDict,
    parts: Parts,
    assignment: Mapping[str, aqs.SiteFormats],
    auxiliary: Any = (),
) -> TrainState:
    """The state that training under formats like those of `assignment` starts from.

    `auxiliary` is learned beside the parameters, where there is no range loss that learns.
    """
    shape = parts.images.splits.image_shape
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    apply = functools.partial(parts.model.apply, train=False)

    def init_scales(variables: Any) -> Any:
        return aqs.quantize_with_state(apply).init(assignment, variables, image)

    own = parts.range_loss.init if parts.range_loss is not None else lambda params: auxiliary
    more = {"init_auxiliary": own, "init_scales": init_scales}
    return init_train_state(parts.model, parts.optimizer, shape, config.seed, **more)


def make_update(
    config: ml_collections.ConfigDict, parts: Parts, qapply: Callable, net: Elastic | None = None
) -> Callable:
    """The update of the weights: `train_step.make_update` with the configured losses."""

    def auxiliary_loss(params, state):
        return config.range_loss.weight * parts.range_loss.apply(params, state)

    return train_step.make_update(
        qapply,
        parts.optimizer,
        label_smoothing=config.label_smoothing,
        auxiliary_loss=None if parts.range_loss is None else auxiliary_loss,
        net=net,
    )


def training_stream(config: ml_collections.ConfigDict, images: Images, seed_offset: int = 0) -> Any:
    """Endless shuffled and augmented training batches."""
    return data.train_batches(
        images.splits.train,
        batch_size=config.batch_size,
        seed=config.seed + seed_offset,
        mean=images.mean,
        std=images.std,
        augmentation=data.Augmentation(
            config.data.crop_padding, config.data.flip, tuple(config.data.crop_area) or None
        ),
        readers=readers(config),
        shard=data_shard(),
    )


def reward_stream(config: ml_collections.ConfigDict, images: Images) -> Any:
    """Endless shuffled batches of the held-out images, not augmented.

    Raises:
      ConfigError: there are not enough for one batch.
    """
    size, there = config.search.held_out_batch_size, len(images.splits.reward)
    if size > there:
        raise ConfigError(
            f"search.held_out_batch_size is {size}, but there are {there} held-out images: give a"
            " smaller one, or hold out more by data.held_out."
        )
    return data.train_batches(
        images.splits.reward,
        batch_size=config.search.held_out_batch_size,
        seed=config.seed + _REWARD_SEED_OFFSET,
        mean=images.mean,
        std=images.std,
        readers=readers(config),
        shard=data_shard(),
    )


def statistics_batches(
    config: ml_collections.ConfigDict, images: Images
) -> Iterator[Mapping[str, np.ndarray]]:
    """The batches that BatchNorm statistics are re-estimated on."""
    stream = training_stream(config, images, _STATISTICS_SEED_OFFSET)
    yield from _first(stream, config.evaluation.calibration_batches)


def evaluation_batches(
    config: ml_collections.ConfigDict, images: Images, split: str, whole: bool = False
) -> Iterator[Mapping[str, np.ndarray]]:
    """One pass over a split ("train", "reward" or "test"), in batches the devices can share.

    Of the training images, not augmented, the first `evaluation.train_images`, in whole batches. In
    a run of several processes each has its shard of every batch, or the `whole` of it.
    """
    replicas, source = replica_count(), getattr(images.splits, split)
    batch_size = math.ceil(config.evaluation.batch_size / replicas) * replicas
    batches = data.eval_batches(
        source,
        batch_size=batch_size,
        mean=images.mean,
        std=images.std,
        readers=readers(config),
        shard=None if whole else data_shard(),
    )
    if split != "train":
        return batches
    wanted = config.evaluation.train_images
    count = available("evaluation.train_images", wanted, len(source), "training images")
    return _first(batches, math.ceil(count / batch_size))


def _first(stream: data.Batches, count: int) -> Iterator[Mapping[str, np.ndarray]]:
    """The first batches of a stream, whose workers end with the last of them."""
    with contextlib.closing(stream):
        yield from itertools.islice(stream, count)
