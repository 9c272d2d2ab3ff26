"""How much each site suffers from each format when it alone is quantized."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.calibration import Bounds, Calibration
from aqt_search.numerics.fake_quant import fake_quant
from aqt_search.numerics.formats import NumericFormat, numeric_format, stack_formats
from aqt_search.numerics.quantizer import Quantizer, operand_format, quantizer
from aqt_search.numerics.signal_to_noise import sqnr_db
from aqt_search.search.options import SpaceError
from aqt_search.search.space import Space, make_space
from aqt_search.tracing.sites import Operand, Site
from aqt_search.tracing.transform import quantize, quantize_with_state
from aqt_search.training.assignment_batch import (
    evaluate_assignments,
    forward_arguments,
    on_one_replica,
)

OPERANDS = ("both", "weight", "activation")
FLOAT = "float"  # the reference in which nothing is quantized


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Quality with one site at a time in another format than the reference's."""

    formats: tuple[str, ...]
    sites: tuple[str, ...]  # in network order
    reference: str  # "float", or the format of all other operands
    accuracy: np.ndarray  # [sites, formats], float64, in [0, 1]
    loss: np.ndarray  # [sites, formats], float64, nats; not finite where the logits are not
    sqnr_db: np.ndarray  # [sites, formats], float64, decibels; NaN where it is not defined
    reference_accuracy: float
    reference_loss: float
    images: int

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; null for what is not finite."""

        def plain(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [plain(element) for element in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: plain(v.tolist() if isinstance(v, np.ndarray) else v) for k, v in fields.items()}


def sensitivity(
    fun: Callable,
    variables: Mapping[str, Any],
    sites: Mapping[str, Site],
    formats: Sequence[str],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    reference: str = FLOAT,
    operands: str = "both",
    chunk: int = 16,
    batch_stats: str = "batch",
) -> Sensitivity:
    """Accuracy, loss and signal-to-noise ratio of every (site, format) alone.

    In a row of the result one site takes each of the formats, and all others stay as in the
    reference. The weights are not trained again. With sums over the elements of an operand x, in
    the reference's forward pass of the first batch,

        SQNR = -10 log10(sum over the site's operands in the format of N(x)) dB
        N(x) = sum (x - fake_quant(x))^2 / sum x^2

    which is about the ratio in the site's output, if the errors are uncorrelated, and so are the
    terms that the product adds up. It is not defined (NaN) where nothing is lost or the operands
    are all zero, for a lookup and inside a while loop.

    Args:
      fun: `model.apply` of a Linen model, not quantized.
      variables: {"params": ..., "batch_stats": ...}.
      sites: of fun; those that cannot be quantized, or lack the operand, are left out.
      formats: names of formats.
      batches: held-out images with "image", "label" and "mask", as `data.eval_batches` yields them.
      reference: "float", or the format of everything else.
      operands: which of the site take the format: "both", the "weight" or the "activation".
      chunk, batch_stats: as for `evaluate_assignments`.

    Raises:
      FormatError: unknown format.
      SpaceError: no format beside the reference; a format twice; unknown `operands`.
      ValueError: there is no example.
    """
    space = sensitivity_space(sites, formats, reference, operands)
    columns = [space.decisions[0].options.index(name) for name in formats]
    choices = np.zeros((1 + len(space.decisions) * len(columns), len(space.decisions)), int)
    for row, (decision, option) in enumerate(
        itertools.product(range(len(space.decisions)), columns), start=1
    ):
        choices[row, decision] = option
    first, batches = _first_of(batches)
    quality = evaluate_assignments(
        quantize(fun), jax.vmap(space.assignment)(choices), variables, batches,
        chunk=chunk, batch_stats=batch_stats,
    )  # fmt: skip
    shape = (len(space.decisions), len(columns))
    return Sensitivity(
        formats=tuple(formats),
        sites=tuple(decision.sites[0] for decision in space.decisions),
        reference=reference,
        accuracy=quality.accuracy[1:].reshape(shape),
        loss=quality.loss[1:].reshape(shape),
        sqnr_db=operand_sqnr(fun, variables, space, formats, first["image"], batch_stats),
        reference_accuracy=float(quality.accuracy[0]),
        reference_loss=float(quality.loss[0]),
        images=quality.examples,
    )


def _first_of(batches: Iterable) -> tuple[Any, Iterable]:
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("Sensitivities need at least one batch; got none.")
    return first, itertools.chain([first], batches)


def sensitivity_space(
    sites: Mapping[str, Site], formats: Sequence[str], reference: str, operands: str
) -> Space:
    """A decision for each site, whose option 0 is the reference."""
    if operands not in OPERANDS:
        raise SpaceError(f"operands is {operands!r}; expected one of {', '.join(OPERANDS)}.")
    for name in formats:
        numeric_format(name)
    rest = None if reference == FLOAT else reference
    options = (rest, *(name for name in formats if name != reference))
    spec: Any = options
    if operands != "both":
        (other,) = set(OPERANDS) - {"both", operands}
        spec = {operands: options, other: rest}
    refused = [(f"^{re.escape(name)}$", None) for name, site in sites.items() if site.refused]
    return make_space(sites, [*refused, (".*", spec)])


class _Power(NamedTuple):
    """What `_meter` remembers of a tensor."""

    bound: jax.Array
    signal: jax.Array  # [], float32: sum x^2
    noise: jax.Array  # [formats], float32: sum (x - fake_quant(x))^2


# One object for equal formats: the layers of a stack have one calibration.
@functools.cache
def _meter(formats: tuple[NumericFormat, ...]) -> Calibration:
    """absmax(), and in its state how much each of the formats would lose of the tensor."""
    table = stack_formats(formats)

    def init(shape):
        return _Power(jnp.zeros(shape), jnp.float32(0), jnp.zeros(len(formats)))

    def apply(state, x, over, grid, error):
        channels = [axis for axis in range(x.ndim) if axis not in over.axes]

        def noise(fmt):
            return jnp.sum(jnp.square(fake_quant(x, fmt, channels) - x))

        bound = over.max(jnp.abs(x))
        lost = jax.lax.map(noise, jax.tree.map(jnp.asarray, table))
        return Bounds(bound), _Power(bound, jnp.sum(x * x), lost)

    return Calibration(init, apply, read=lambda state, grid: Bounds(state.bound), covers=True)


def _metered(operand: Operand, reference: Any, formats: Sequence[str]) -> Quantizer:
    """The reference's quantizer of an operand, with a meter for `formats`."""
    measured = tuple(operand_format(quantizer(name), operand.nonnegative) for name in formats)
    spec = quantizer("fp32" if reference is None else reference)  # float32 rounds to itself
    return dataclasses.replace(spec, calibration=_meter(measured))


def operand_sqnr(
    fun: Callable,
    variables: Mapping[str, Any],
    space: Space,
    formats: Sequence[str],
    images: np.ndarray,
    batch_stats: str,
) -> np.ndarray:
    """The SQNR in dB of every decision of a `sensitivity_space` and format: [decisions, formats].

    The operands are those of a forward pass in the reference; they are read by calibrations whose
    states hold the sums.
    """
    assignment = space.concrete_assignment([0] * len(space.decisions))
    for decision in space.format_decisions.values():
        site = space.sites[decision.sites[0]]
        if site.kind == "gather" or site.repeats is None:
            continue  # they take no calibration with state
        reference = assignment[site.name]
        for side, spec in decision.formats(site, 1)._asdict().items():
            if spec is not None:
                meter = _metered(getattr(site, side), getattr(reference, side), formats)
                assignment[site.name] = assignment[site.name]._replace(**{side: meter})
    stateful = quantize_with_state(fun)

    @jax.jit
    def measured(variables, images):
        def forward():
            arguments = forward_arguments(variables, batch_stats)
            state = stateful.init(assignment, variables, images, **arguments)
            return stateful.apply(assignment, state, variables, images, **arguments)[1]

        return on_one_replica(forward)

    powers = jax.device_get(measured(variables, images))
    ratios = np.full((len(space.decisions), len(formats)), np.nan)
    for row, decision in zip(ratios, space.decisions):
        site = space.sites[decision.sites[0]]
        if of_site := powers.get(site.stack):
            of_layer = jax.tree.map(lambda leaf, layer=site.layer: leaf[layer], of_site)
            row[:] = sum(_noise_to_signal(power) for power in of_layer.values())
    return sqnr_db(ratios)


def _noise_to_signal(power: _Power) -> np.ndarray:
    """N of an operand for every format, float64; inside a scan of all iterations together."""
    noise, signal = np.asarray(power.noise, float), np.sum(power.signal, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return noise.reshape(-1, noise.shape[-1]).sum(0) / signal
