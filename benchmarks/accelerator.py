"""Products, decoding, serving, training and search on this device, as ratios in one run.

    python -m benchmarks.accelerator                        # all parts, on whatever JAX finds
    python -m benchmarks.accelerator --only products --only training
    python -m benchmarks.accelerator --quick                # small shapes, to see that it runs

A line is a program: milliseconds, planned temporary memory and the time to trace, lower and compile
it, each beside the first line of its table, which is the work in bfloat16 (float32 on CPU). All
programs of a table are built first, then run in turns in one process. Qwix and AQT are optional:
`pip install aqt-search[bench]`. A program that fails is said to, with why.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import aqt_search as aqs
from aqt_search import models
from benchmarks import peers, search_step, timing
from benchmarks.peers import MATRIX_PRODUCT
from benchmarks.quantized_ops import Program, note_of, training_step

Make = Callable[[], Program]


class Model(NamedTuple):
    """A network of the zoo and what it runs on."""

    name: str
    form: str
    pixels: int
    batch: int

    def build(self, dtype: Any) -> Any:
        """The network."""
        return models.build(self.name, 1000, form=self.form, dtype=dtype)

    @property
    def title(self) -> str:
        """What is run."""
        return f"{self.name}, {self.batch} images of {self.pixels} x {self.pixels}"


class Sizes(NamedTuple):
    """Shapes of the work."""

    products: tuple[tuple[int, int, int], ...]  # [m, k] x [k, n]
    decoding: tuple[int, tuple[int, ...]]  # k = n, and the rows of activations
    serving: tuple[Model, ...]
    training: tuple[Model, ...]
    search: tuple[int, int, int]  # ResNet of depth, batch, pixels


LARGE = Sizes(
    ((8192, 8192, 8192), (4096, 4096, 4096), (16384, 1024, 4096)),
    (8192, (1, 8, 64)),
    (Model("vit_b", "imagenet", 224, 64), Model("resnet50", "imagenet", 224, 64)),
    (Model("vit_s", "imagenet", 224, 128), Model("resnet50", "imagenet", 224, 128)),
    (20, 128, 32),
)
ON_CPU = Sizes(
    ((2048, 512, 512),), (4096, (1, 8, 64)),
    (Model("vit_ti", "cifar", 32, 32), Model("resnet20", "cifar", 32, 64)),
    (Model("resnet20", "cifar", 32, 128),), (20, 128, 32),
)  # fmt: skip
QUICK = Sizes(
    ((256, 128, 128),), (256, (1,)), (Model("resnet8", "cifar", 16, 4),),
    (Model("resnet8", "cifar", 16, 8),), (8, 8, 16),
)  # fmt: skip


def float_dtype() -> Any:
    """What the first line of a table computes in."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers in the float of the device."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values, float_dtype())


# --- Products -------------------------------------------------------------------------------------


def products(size: tuple[int, int, int]) -> dict[str, Make]:
    """A product whose weights are stored; activations come in float."""
    m, k, n = size
    x, w = normal(m, k), normal(k, n, seed=1)
    bound = float(jnp.max(jnp.abs(x)))

    def ours(fmt: str, how: Any) -> Make:
        def make() -> Program:
            stored = aqs.quantize_tensor(w, fmt, (1,), order=(1, 0))

            def run(x, stored):
                return aqs.dot_general(x, stored, MATRIX_PRODUCT, lhs_format=how, execution=native)

            native = "int8" if fmt == "int8" else "fp8"
            return Program(run, (x, stored))

        return make

    def static(fmt: str) -> aqs.Quantizer:
        return aqs.Quantizer(fmt, calibration=aqs.fixed(bound))

    found: dict[str, Make] = {
        "float": lambda: Program(lambda x, w: x @ w, (x, w)),
        "int8, static scale": ours("int8", static("int8")),
        "int8, a scale per batch": ours("int8", "int8"),
        "int8, a scale per row": ours("int8", aqs.Quantizer("int8", aqs.PER_TOKEN)),
    }
    if jax.default_backend() != "cpu":
        found["e4m3, static scale"] = ours("e4m3", static("e4m3"))
        found["e4m3, a scale per row"] = ours("e4m3", aqs.Quantizer("e4m3", aqs.PER_TOKEN))
    for name, fixed in (("static scale", bound), ("a scale per row", None)):
        found[f"Qwix int8, {name}"] = lambda b=fixed: _served(
            peers.qwix_served_dot(w, jnp.int8, b), x
        )
        found[f"AQT int8, {name}"] = lambda b=fixed: _served(peers.aqt_served_dot(w, 8, b), x)
    return found


def _served(made: tuple[Callable, Any], x: jax.Array) -> Program:
    run, stored = made
    return Program(run, (x, stored))


def decoding(k: int, rows: int) -> dict[str, Make]:
    """A product of few rows, where reading the weights is what takes time."""
    x, w = normal(rows, k), normal(k, k, seed=1)

    def ours(fmt: str, activations: str | None, execution: str) -> Make:
        def make() -> Program:
            stored = aqs.quantize_tensor(w, fmt, (1,), order=(1, 0))
            how = {"lhs_format": activations, "execution": execution}
            return Program(lambda x, s: aqs.dot_general(x, s, MATRIX_PRODUCT, **how), (x, stored))

        return make

    return {
        "float": lambda: Program(lambda x, w: x @ w, (x, w)),
        "int8 weights": ours("int8", None, "auto"),
        "int4 weights": ours("int4", None, "auto"),
        "int8 weights and activations": ours("int8", "int8", "auto"),
        "int4 weights, int8 activations": ours("int4", "int8", "auto"),
        "Qwix int8 weights and activations": lambda: _served(
            peers.qwix_served_dot(w, jnp.int8, None), x
        ),
        "AQT int8 weights and activations": lambda: _served(peers.aqt_served_dot(w, 8, None), x),
    }


# --- Networks -------------------------------------------------------------------------------------


def _variables(model: Any, images: jax.Array) -> Any:
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images[:1])


def serving(model: Model) -> dict[str, Make]:
    """A network in evaluation, its weights in int8 and its activations under static scales."""
    network, images = model.build(float_dtype()), normal(model.batch, model.pixels, model.pixels, 3)
    variables = _variables(network, images)
    apply = functools.partial(network.apply, train=False)
    sites = aqs.find_sites(apply, variables, images)
    assignment = aqs.with_static_activations(aqs.assign(sites, [(".*", "int8")]), sites)
    qfun = aqs.quantize_with_state(apply)
    state = qfun.init(assignment, variables, images)
    _, state = jax.jit(qfun.apply)(assignment, state, variables, images)
    frozen = aqs.freeze(apply, assignment, variables, images, state=state)

    def ours(execution: Any) -> Make:
        return lambda: Program(aqs.serve(apply, execution=execution), (frozen, images))

    def measured() -> Program:
        record = aqs.measure_executions(
            apply, assignment, variables, images, state=state, seconds=20
        )
        return ours(record["executions"])()

    return {
        "float": lambda: Program(apply, (variables, images)),
        "int8, emulated": ours("emulated"),
        "int8, native": ours("native"),
        "int8, auto": ours("auto"),
        "int8, measured": measured,
    }


def training(model: Model) -> dict[str, Make]:
    """A step of SGD on random images."""
    dtype = float_dtype()
    network, images = model.build(dtype), normal(model.batch, model.pixels, model.pixels, 3)
    variables = _variables(network, images)
    params, stats = variables["params"], variables.get("batch_stats", {})
    optimizer = optax.sgd(0.1, momentum=0.9)
    labels = jnp.zeros(model.batch, jnp.int32)
    args = (params, stats, optimizer.init(params), images, labels)
    sites = aqs.find_sites(functools.partial(network.apply, train=False), variables, images[:1])
    assignment = aqs.assign(sites, [(".*", "int8")])

    def step(apply: Callable) -> Make:
        return lambda: Program(training_step(apply, optimizer), args)

    def ours(execution: str, residuals: str) -> Make:
        qapply = aqs.quantize(network.apply, execution=execution, residuals=residuals)
        return step(functools.partial(qapply, assignment))

    return {
        "float": step(network.apply),
        "int8, values kept": ours("emulated", "values"),
        "int8, codes kept": ours("emulated", "codes"),
        "int8, auto, codes kept": ours("auto", "codes"),
        "int8, native, codes kept": ours("native", "codes"),
        "Qwix int8": lambda: step(peers.qwix_model(network, jnp.int8).apply)(),
        "AQT int8, mended": lambda: step(peers.aqt_apply(network, 8, mended=True))(),
    }


# --- Tables ---------------------------------------------------------------------------------------


HEADER = f"{'':36} {'ms':>9} {'ratio':>6} {'MB':>8} {'ratio':>6} {'build s':>8}"


def print_lines(
    times: Mapping[str, list[float]],
    built: Mapping[str, timing.Build],
    base: list[float],
    base_bytes: int,
) -> None:
    """A line for each program, beside the times and the memory of the first."""
    for name, values in times.items():
        bytes_, seconds = built[name].temporary_bytes, built[name].seconds
        ratio = f"{bytes_ / base_bytes:.3f}" if base_bytes else "-"
        print(
            f"{name:36} {1e3 * statistics.median(values):9.3f}"
            f" {timing.median_ratio(values, base):6.3f} {bytes_ / 1e6:8.1f} {ratio:>6}"
            f" {seconds:8.2f}",
            flush=True,
        )


def table(title: str, makes: Mapping[str, Make], seconds: float) -> None:
    """Builds and runs the programs of a table, and prints it."""
    built, runs, failed = {}, {}, {}
    for name, make in makes.items():
        if not peers.is_installed(name.split()[0]):
            failed[name] = "not installed"
            continue
        try:
            program = make()
            built[name] = timing.build(jax.jit(program.fun), *program.args)
            runs[name] = functools.partial(built[name].compiled, *program.args)
            jax.block_until_ready(runs[name]())
        except Exception as error:
            column = "float32" if name == "float" else name  # whose failure is a bug here
            failed[name] = note_of(column, error)[1]
            runs.pop(name, None)
    times = timing.time_in_turns(runs, timing.rounds_within(runs, seconds))
    base, memory = times["float"], built["float"].temporary_bytes
    print(f"\n{title}\n{HEADER}")
    print_lines(times, built, base, memory)
    for name, why in failed.items():
        print(f"{name:36} {why}", flush=True)


def search_table(size: tuple[int, int, int], seconds: float) -> None:
    """The steps of a search beside those of training."""
    programs = search_step.make_programs(*size)
    built = {program.name: search_step.build(program) for program in programs}
    runs = {program.name: search_step.runner(program) for program in programs}
    times = timing.time_in_turns(runs, timing.rounds_within(runs, seconds))
    first = programs[0].name
    depth, batch, pixels = size
    print(f"\nResNet-{depth}, {batch} images of {pixels} x {pixels}: training and search")
    print(HEADER)
    print_lines(times, built, times[first], built[first].temporary_bytes)


PARTS = ("products", "decoding", "serving", "training", "search")


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be repeated")
    parser.add_argument("--seconds", type=float, default=20, help="of counted rounds per table")
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    sizes = QUICK if args.quick else ON_CPU if on_cpu else LARGE
    seconds = 0.2 if args.quick else args.seconds
    parts = args.only or PARTS
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}, ratios to {jnp.dtype(float_dtype()).name}")
    if "products" in parts:
        for m, k, n in sizes.products:
            table(f"[{m}, {k}] x [{k}, {n}], weights stored", products((m, k, n)), seconds)
    if "decoding" in parts:
        width, rows = sizes.decoding
        for m in rows:
            table(f"[{m}, {width}] x [{width}, {width}]", decoding(width, m), seconds)
    if "serving" in parts:
        for model in sizes.serving:
            table(f"Serving {model.title}", serving(model), seconds)
    if "training" in parts:
        for model in sizes.training:
            table(f"Training {model.title}", training(model), seconds)
    if "search" in parts:
        search_table(sizes.search, seconds)


if __name__ == "__main__":
    main()
