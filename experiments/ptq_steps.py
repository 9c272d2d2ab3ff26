"""Steps of quantization after training, and the order in which they may come."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search import ptq
from aqt_search.training import parallel
from aqt_search.training.evaluation import reestimate_batch_stats
from experiments import from_config


class Quantized(NamedTuple):
    """A model on its way into its formats."""

    variables: Mapping[str, Any]  # {"params": ..., "batch_stats": ...}
    assignment: Mapping[str, aqs.SiteFormats]  # with calibrations that have state
    state: Any  # static bounds, by site and operand
    statistics: Any = None  # of BatchNorms by site, where there are no data


@functools.lru_cache(maxsize=4)
def _functions(model: Any) -> tuple[Callable, Callable]:
    """The function of a model, plain and quantized: equal models share them, and so programs."""
    plain = functools.partial(model.apply, train=False)
    return plain, from_config.quantized(model, parallel.AXIS)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the steps work with."""

    model: Any
    formats: Mapping[str, aqs.SiteFormats]  # as they were asked for
    batches: Sequence[np.ndarray]  # calibration images
    options: ml_collections.ConfigDict  # config.ptq

    @property
    def apply(self) -> Callable:
        """apply(variables, images), in evaluation mode."""
        return _functions(self.model)[0]

    @property
    def qapply(self) -> Callable:
        """The quantized model, its static bounds among the variables."""
        return _functions(self.model)[1]

    def calibrated(self, variables: Mapping[str, Any], statistics: Any = None) -> Quantized:
        """The model with bounds of these weights, and of the activations they lead to.

        Args:
          statistics: of the BatchNorms that tell the activations' bounds; None: the data do.
        """
        if statistics is None:
            found = ptq.calibrate(self.apply, self.formats, variables, self.batches)
            return Quantized(variables, *found)
        bounds = dict(self.options.other_bounds)
        image = jax.ShapeDtypeStruct(self.batches[0].shape, np.float32)
        found = ptq.calibrate_data_free(
            self.apply, self.formats, variables, image, statistics, other_bounds=bounds
        )
        return Quantized(variables, *found, statistics)


# --- Steps ----------------------------------------------------------------------------------------


def _fold(setting: Setting, model: Quantized) -> Quantized:
    folded = ptq.fold_batch_norm(setting.apply, model.variables, setting.batches[0])
    return setting.calibrated(folded, model.statistics)


def _equalize(setting: Setting, model: Quantized) -> Quantized:
    arguments = setting.apply, model.variables, setting.batches[0]
    statistics = model.statistics
    if statistics is not None:
        scales = ptq.equalization_scales(*arguments)
        statistics = {
            name: found.divided_by(scales[name]) if name in scales else found
            for name, found in statistics.items()
        }
    return setting.calibrated(ptq.equalize(*arguments), statistics)


def _smooth(setting: Setting, model: Quantized) -> Quantized:
    strength = setting.options.smoothing
    return setting.calibrated(ptq.smooth(setting.apply, model.variables, setting.batches, strength))


def _reestimate(setting: Setting, model: Quantized) -> Quantized:
    """BatchNorm statistics under the quantized weights, whose bounds stay."""
    variables = {**model.variables, "scales": model.state}
    batches = ({"image": images} for images in setting.batches)
    statistics = reestimate_batch_stats(setting.qapply, model.assignment, variables, batches)
    again = setting.calibrated({**model.variables, "batch_stats": statistics})
    sites = aqs.find_sites(setting.apply, model.variables, setting.batches[0])

    def kept(name: str, side: str) -> Any:
        is_activation = getattr(sites[name], side).role == "activation"
        return (again if is_activation else model).state[name][side]

    state = {n: {side: kept(n, side) for side in sides} for n, sides in again.state.items()}
    return again._replace(state=state)


def _adaround(setting: Setting, model: Quantized) -> Quantized:
    rounded = ptq.adaround(
        setting.apply, model.assignment, model.state, model.variables, setting.batches,
        steps=setting.options.adaround_steps,
    )  # fmt: skip
    return model._replace(variables=rounded)


def _gptq(setting: Setting, model: Quantized) -> Quantized:
    rounded = ptq.gptq(
        setting.apply, model.assignment, model.state, model.variables, setting.batches
    )
    return model._replace(variables=rounded)


def _correct_bias(setting: Setting, model: Quantized) -> Quantized:
    arguments = setting.apply, model.assignment, model.state, model.variables
    if model.statistics is None:
        return model._replace(variables=ptq.correct_bias(*arguments, setting.batches))
    corrected = ptq.correct_bias_data_free(*arguments, setting.batches[0], model.statistics)
    return model._replace(variables=corrected)


class Step(NamedTuple):
    """One step, and what has to come before it or may not."""

    run: Callable[[Setting, Quantized], Quantized]
    after: tuple[str, ...] = ()  # steps that must have been done
    before: tuple[str, ...] = ()  # steps that must not
    needs_data: bool = True


_ROUNDINGS = ("adaround", "gptq")
STEPS: Mapping[str, Step] = {
    "fold_batch_norm": Step(_fold, (), _ROUNDINGS, needs_data=False),
    "equalize": Step(_equalize, ("fold_batch_norm",), _ROUNDINGS, needs_data=False),
    "smooth": Step(_smooth, (), _ROUNDINGS),
    # Folded BatchNorms have the scale of their statistics in the weights.
    "reestimate_batch_norm": Step(_reestimate, (), ("fold_batch_norm", "correct_bias")),
    "adaround": Step(_adaround, (), _ROUNDINGS),
    "gptq": Step(_gptq, (), _ROUNDINGS),
    "correct_bias": Step(_correct_bias, needs_data=False),
}


def check_steps(names: Sequence[str], data_free: bool = False) -> None:
    """Raises ConfigError for steps that do not go together."""
    done: list[str] = []
    for name in names:
        step = STEPS[name]
        missing = [other for other in step.after if other not in done]
        if missing:
            raise from_config.ConfigError(f"ptq.steps: {name!r} needs {missing[0]!r} before it.")
        odd = [other for other in step.before if other in done]
        if odd:
            raise from_config.ConfigError(f"ptq.steps: {name!r} cannot come after {odd[0]!r}.")
        if data_free and step.needs_data:
            raise from_config.ConfigError(
                f"ptq.steps: {name!r} needs data, and ptq.data_free is set. Leave one of them out."
            )
        done.append(name)
