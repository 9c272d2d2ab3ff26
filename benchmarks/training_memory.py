"""What a training step of int8 products plans to hold, beside the float one, and what fits so.

    python -m benchmarks.training_memory                  # 5 networks: a few minutes on 2 cores
    python -m benchmarks.training_memory --gigabytes 80 --dtype bfloat16
    python -m benchmarks.training_memory --quick          # a small one, to see that it runs

Steps are compiled, not run: XLA's plan for the device at hand tells the temporary bytes of a step,
and with its arguments and results what it takes in all. The largest batch is looked for by
compiling, from the one on that its growth from one batch to another says.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import aqt_search as aqs
from benchmarks import timing
from benchmarks.accelerator import Model
from benchmarks.quantized_ops import RESNET_OPTIMIZER, training_step
from benchmarks.search_step import SIXTEEN

NETWORKS = (
    Model("resnet20", "cifar", 32, 128),
    Model("resnet50", "imagenet", 224, 32),
    Model("vit_s", "imagenet", 224, 32),
    Model("vit_b", "imagenet", 224, 16),
    Model("mobilenet_v2", "imagenet", 224, 32),
)
QUICK = (Model("resnet8", "cifar", 16, 16),)

Plan = Callable[[int], timing.Build]  # of a step at a batch


def plans(model: Model, dtype: Any) -> dict[str, Plan]:
    """The step in float, on int8 and on formats that are data, as in a search."""
    network = model.build(dtype)
    image = jax.ShapeDtypeStruct((1, model.pixels, model.pixels, 3), dtype)
    evaluate = functools.partial(network.apply, train=False)
    variables = jax.eval_shape(
        functools.partial(network.init, train=False), jax.random.key(0), image
    )
    sites = aqs.find_sites(evaluate, variables, image)
    int8 = aqs.assign(sites, [(".*", "int8")])
    params, stats = variables["params"], variables.get("batch_stats", {})
    state = jax.eval_shape(RESNET_OPTIMIZER.init, params)

    def plan(apply: Callable, formats: Any = None) -> Plan:
        def step(formats, *args):
            own = apply if formats is None else functools.partial(apply, formats)
            own = functools.partial(own, rngs={"dropout": jax.random.key(0)})
            return training_step(own, RESNET_OPTIMIZER)(*args)

        def at(batch: int) -> timing.Build:
            images = jax.ShapeDtypeStruct((batch, *image.shape[1:]), dtype)
            labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
            jitted = jax.jit(step, donate_argnums=(1, 2, 3))
            return timing.build(jitted, formats, params, stats, state, images, labels)

        return at

    def quantized(residuals: str) -> Callable:
        return aqs.quantize(network.apply, residuals=residuals, options=SIXTEEN)

    table = aqs.stack_formats(SIXTEEN)
    one = jax.eval_shape(lambda: jax.tree.map(lambda field: field[0], table))
    traced = {name: aqs.SiteFormats(one, one) for name in int8}
    return {
        "float": plan(network.apply),
        "int8, values kept": plan(functools.partial(quantized("values"), int8)),
        "int8, codes kept": plan(functools.partial(quantized("codes"), int8)),
        "16 formats, values kept": plan(quantized("values"), traced),
        "16 formats, codes kept": plan(quantized("codes"), traced),
    }


def largest_batch(plan: Plan, budget: float, batch: int, built: timing.Build) -> int:
    """The largest multiple of eight whose step plans no more bytes than the budget; 0 for none."""

    def fits(tried: int) -> bool:
        return plan(tried).peak_bytes <= budget

    small = plan(8).peak_bytes
    growth = (built.peak_bytes - small) / (batch - 8)
    tried = max(8, 8 * int((8 + (budget - small) / growth) // 8))
    if fits(tried):
        while fits(tried + 8):
            tried += 8
        return tried
    while tried > 0 and not fits(tried):
        tried -= 8
    return tried


def print_network(model: Model, dtype: Any, budget: float | None) -> None:
    """Plans and prints a table."""
    made = plans(model, dtype)
    built = {name: plan(model.batch) for name, plan in made.items()}
    base = built["float"]
    print(f"\n{model.title}, {jnp.dtype(dtype).name}")
    print(f"{'':28} {'MB':>9} {'ratio':>6} {'in all':>9} {'ratio':>6}  largest batch")
    largest: dict[str, int] = {}
    for name, own in built.items():
        if budget is not None and "values" not in name:
            largest[name] = largest_batch(made[name], budget, model.batch, own)
        print(
            f"{name:28} {own.temporary_bytes / 1e6:9.1f}"
            f" {own.temporary_bytes / base.temporary_bytes:6.3f} {own.peak_bytes / 1e6:9.1f}"
            f" {own.peak_bytes / base.peak_bytes:6.3f}  {_beside(largest, name)}",
            flush=True,
        )


def _beside(largest: Mapping[str, int], name: str) -> str:
    if name not in largest:
        return ""
    own, base = largest[name], largest["float"]
    return f"{own:6d}" + (f" ({own / base:.2f} x)" if base else "")


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small network")
    parser.add_argument("--only", choices=[m.name for m in NETWORKS], help="one of the networks")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--gigabytes", type=float, help="look for the largest batch that fits in so many 1e9 bytes"
    )
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} ({device.device_kind})")
    budget = None if args.gigabytes is None else 1e9 * args.gigabytes
    for model in QUICK if args.quick else NETWORKS:
        if args.only in (None, model.name) or args.quick:
            print_network(model, jnp.dtype(args.dtype), budget)


if __name__ == "__main__":
    main()
