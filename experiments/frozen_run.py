"""The model that a finished run ended with, as it is served: integer codes and static scales."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

import aqt_search as aqs
from aqt_search.training.scales import SCALES
from aqt_search.training.storage import as_path
from experiments import finished_run, from_config, results


class FrozenRun(NamedTuple):
    """What `aqs.serve(apply)(frozen, images)` takes."""

    apply: Callable  # apply(variables, images), in evaluation mode
    frozen: aqs.Frozen


def frozen_run(
    config: ml_collections.ConfigDict, folder: Path, images: from_config.Images | None = None
) -> FrozenRun:
    """Freezes what `folder` holds, with the statistics and scales that its result was told with.

    Args:
      config: that of the run; its own `evaluation.calibration_batches` are used.
      folder: the workdir of a finished run of train, search or supernet, or a subnet that
        experiments.subnets found (`points/<name>`).
      images: saves loading them again.

    Raises:
      ConfigError: there is no finished run, or one of another model, data set or seed.
      CheckpointError: its checkpoint is not whole.
    """
    folder = as_path(folder)
    images = images or from_config.load_images(config)
    run = finished_run.load(config, folder, images)
    formats = finished_run.ended_formats(run, folder)
    judged = results.estimated(run.config, run.parts, formats, run.variables)
    own = dict(judged.variables.get("own", judged.variables))
    state = judged.variables.get(SCALES) or own.get(SCALES)
    own.pop(SCALES, None)
    apply = functools.partial(run.parts.model.apply, train=False)
    image = jax.ShapeDtypeStruct((1, *images.splits.image_shape), jnp.float32)
    return FrozenRun(apply, aqs.freeze(apply, judged.assignment, own, image, state=state or None))
