"""What range losses and learned scales cost a training step.

    python -m benchmarks.low_bit_step            # ResNet-20, 32 x 32 x 3, batch 128: some minutes
    python -m benchmarks.low_bit_step --quick    # smaller, to see that it runs

All programs take turns (`benchmarks.timing`). Steps with a range loss are compared with the float
step, those with learned scales or a gradient rule with the int4 step that has absmax scales.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aqt_search as aqs
from aqt_search.models.resnet import resnet
from aqt_search.numerics.gradient_rules import ewgs
from aqt_search.numerics.learned_scales import batch_quant, lsq, pact
from aqt_search.numerics.quantizer import Quantizer
from aqt_search.training.evaluation import as_data
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.scales import with_scales
from aqt_search.training.train_step import init_train_state, make_update
from aqt_search.weights.range_loss import range_loss
from benchmarks import timing
from benchmarks.search_step import Program, random_batch, runner
from experiments.allocator import keep_freed_memory

LOSSES = ("l_inf", "margin", "soft_min_max", "kurtosis")


def quantizers() -> Mapping[str, tuple[Quantizer, Quantizer]]:
    """By name: how weights and activations are quantized, both in int4."""
    absmax = Quantizer("int4")
    return {
        "int4, absmax": (absmax, absmax),
        "int4, LSQ": (Quantizer("int4", calibration=lsq()),) * 2,
        "int4, LSQ of 4 formats": (
            Quantizer("int4", calibration=lsq("int2", "int3", "int4", "int8")),
        ) * 2,
        "int4, LSQ and BatchQuant": (
            Quantizer("int4", calibration=lsq()), Quantizer("int4", calibration=batch_quant()),
        ),
        "int4, absmax and PACT": (absmax, Quantizer("int4", calibration=pact())),
        "int4, absmax and EWGS": (dataclasses.replace(absmax, gradient=ewgs(1e-3)),) * 2,
    }  # fmt: skip


class _Setup:
    """The model and data that all programs share."""

    def __init__(self, depth: int, batch_size: int, image_size: int):
        self.batch = random_batch(np.random.default_rng(0), batch_size, image_size)
        self.model = resnet(depth, 10)
        self.optimizer = make_optimizer("sgd", 0.1, weight_decay=5e-4)
        self.shape = self.batch["image"].shape[1:]
        self.image = jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)
        state = init_train_state(self.model, self.optimizer, self.shape, 0)
        self.apply = functools.partial(self.model.apply, train=False)
        self.sites = aqs.find_sites(self.apply, state.variables, self.image)

    def program(self, name: str, assignment: Any, loss: Any = None) -> Program:
        """A training step under an assignment, with or without a range loss."""
        assignment = as_data(assignment)

        def init_scales(variables):
            return aqs.quantize_with_state(self.apply).init(assignment, variables, self.image)

        more = {} if loss is None else {"init_auxiliary": loss.init}
        state = init_train_state(
            self.model, self.optimizer, self.shape, 0, init_scales=init_scales, **more
        )
        qapply = with_scales(aqs.quantize_with_state(self.model.apply))
        update = make_update(
            qapply, self.optimizer, auxiliary_loss=None if loss is None else loss.apply
        )
        return Program(name, lambda s, a, b: update(s, a, b)[:2], state, assignment, (self.batch,))


def make_programs(depth: int, batch_size: int, image_size: int) -> dict[str, Program]:
    """Every program by name, with the one it is compared with."""
    setup = _Setup(depth, batch_size, image_size)
    programs = {"float32": setup.program("float32", {})}
    for name in LOSSES:
        loss = range_loss(setup.sites, [(".*", name)])
        programs[f"float32, {name}"] = setup.program(name, {}, loss)
    for name, (weight, activation) in quantizers().items():
        rules = [(".*", {"weight": weight, "activation": activation})]
        programs[name] = setup.program(name, aqs.assign(setup.sites, rules))
    return programs


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-8, 16 x 16, batch 32")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    args = parser.parse_args()
    keep_freed_memory()  # as every job does
    size = (8, 32, 16) if args.quick else (20, 128, 32)
    programs = make_programs(*size)
    seconds = timing.time_in_turns({n: runner(p) for n, p in programs.items()}, args.rounds)
    print(f"ResNet-{size[0]}, batch {size[1]}, {size[2]} x {size[2]} x 3, on", end=" ")
    print(f"{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'program':28} {'ms':>7} {'ratio':>6}")
    for name, values in seconds.items():
        base = "float32" if name.startswith("float32") else "int4, absmax"
        ratio = timing.median_ratio(values, seconds[base])
        print(f"{name:28} {1000 * float(np.median(values)):>7.1f} {ratio:>6.3f}")


if __name__ == "__main__":
    main()
