"""Quantized operations beside float32, Qwix and AQT: time, build time, roundings and memory.

    python -m benchmarks.quantized_ops                     # every row: about 15 minutes
    python -m benchmarks.quantized_ops --only dot --only conv
    python -m benchmarks.quantized_ops --quick             # small shapes, to see that it runs

A cell is a ratio to float32 of the same row, whose own value stands in the first column. All
programs of a row are built first, then run in turns in one process (`benchmarks.timing`). Qwix and
AQT are optional: `pip install aqt-search[bench]`. Goals are the project's (CONTRIBUTING.md) on two
CPU cores; nothing here fails if one is missed. A cell of "raises" is explained below its row, and
so is "!": a result that is all zeros, or not finite, where that of float32 is not. On a GPU there
are rows for large products and for memory besides, and a column for bfloat16.

Columns: `emulated`, `native` and `auto` are aqt_search under that execution. Each library keeps its
defaults; "AQT mended" is AQT with straight-through gradients for its convolutions, which have none.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import aqt_search as aqs
from aqt_search.models.resnet import resnet
from benchmarks import peers, timing
from benchmarks.peers import MATRIX_PRODUCT, NHWC

EXECUTIONS = ("emulated", "native", "auto")
COLUMNS = ("float32", "bfloat16", *EXECUTIONS, "Qwix", "AQT", "AQT mended")
PEER_FORMATS = {"int8": (jnp.int8, 8), "int4": (jnp.int4, 4), "e4m3": (jnp.float8_e4m3fn, "e4m3")}


class Sizes(NamedTuple):
    """Shapes of the work."""

    dot: tuple[int, int, int]  # [m, k] x [k, n]
    conv: tuple[int, int, int]  # batch, height and width, channels
    depthwise: tuple[int, int, int]
    resnet: tuple[int, int, int]  # depth, batch, height and width
    mlp: tuple[int, int, int]  # layers, batch, width
    large_dot: tuple[int, int, int]
    large_resnet: tuple[int, int, int]


FULL = Sizes(
    (2048, 512, 512), (64, 16, 64), (32, 16, 64), (20, 128, 32), (24, 128, 64),
    (8192, 8192, 8192), (50, 256, 224),
)  # fmt: skip
QUICK = Sizes(
    (256, 128, 128), (4, 8, 16), (4, 8, 16), (8, 8, 16), (4, 8, 16), (512, 512, 512), (18, 2, 64)
)


class Program(NamedTuple):
    """A function and its arguments: arrays, or their shapes if it is only built."""

    fun: Callable
    args: tuple[Any, ...]


class Row(NamedTuple):
    """A line of the table."""

    name: str
    title: str
    goal: str
    measure: Callable[[Mapping[str, Program], Options], Measured]
    make: Callable[[str], Program | None]  # column -> its program; None where there is none
    gpu: bool = False


Notes = list[tuple[str, str]]  # column, what there is to say about its cell


class Options(NamedTuple):
    """How long to measure."""

    seconds: float  # of counted rounds, per row
    builds: int


class Measured(NamedTuple):
    """A row's result."""

    base: str  # the value of float32, with its unit
    cells: dict[str, str]
    notes: Notes


# What is measured: a function of (x, w) for each column.


def dot_function(
    column: str, fmt: str, features: int, backward: bool = False
) -> peers.Binary | None:
    """x [m, k] times w [k, features], both in `fmt`; with gradients if `backward`."""
    dtype, bits = PEER_FORMATS[fmt]
    if column in ("float32", "bfloat16"):
        return functools.partial(jax.lax.dot_general, dimension_numbers=MATRIX_PRODUCT)
    if column == "Qwix" and backward:
        return peers.qwix_layer(nn.Dense(features, use_bias=False), dtype)
    if column == "Qwix":
        return peers.qwix_dot(dtype)
    if column == "AQT":
        return functools.partial(peers.aqt_dot(bits), dimension_numbers=MATRIX_PRODUCT)
    if column == "AQT mended":
        return None
    return functools.partial(
        aqs.dot_general, dimension_numbers=MATRIX_PRODUCT, lhs_format=fmt, rhs_format=fmt,
        execution=column,
    )  # fmt: skip


def conv_function(column: str, features: int, groups: int) -> peers.Binary:
    """3 x 3 convolution with stride 1 and "SAME" padding, both operands in int8."""
    options = {"dimension_numbers": NHWC, "feature_group_count": groups}
    if column == "Qwix":
        layer = nn.Conv(features, (3, 3), use_bias=False, feature_group_count=groups)
        return peers.qwix_layer(layer, jnp.int8)
    if column in ("float32", "bfloat16"):
        conv = jax.lax.conv_general_dilated
    elif column.startswith("AQT"):
        conv = peers.aqt_conv(8, mended=column == "AQT mended")
    else:
        formats = {"lhs_format": "int8", "rhs_format": "int8"}
        conv = functools.partial(aqs.conv_general_dilated, **formats, execution=column)
    return lambda x, w: conv(x, w, (1, 1), "SAME", **options)


def served_dot(column: str, weights: jax.Array, fmt: str, bound: float | None) -> tuple | None:
    """A function of (x, stored) and the stored weights: int8 activations, weights in `fmt`."""
    dtype, bits = PEER_FORMATS[fmt]
    if column in ("float32", "bfloat16"):
        return dot_function(column, fmt, weights.shape[1]), weights
    if column == "Qwix":
        return peers.qwix_served_dot(weights, dtype, bound)
    if column == "AQT":
        return peers.aqt_served_dot(weights, bits, bound)
    if column == "AQT mended":
        return None
    stored = aqs.quantize_tensor(weights, fmt, channel_axes=(1,), order=(1, 0))
    static = aqs.Quantizer("int8", calibration=aqs.fixed(bound)) if bound else "int8"

    def run(x, stored):
        return aqs.dot_general(x, stored, MATRIX_PRODUCT, lhs_format=static, execution=column)

    return run, stored


def quantized_apply(column: str, model: nn.Module, fmt: str, *example: Any) -> Callable:
    """`model.apply` with every operand of its products in `fmt`."""
    dtype, bits = PEER_FORMATS[fmt]
    if column in ("float32", "bfloat16"):
        return model.apply
    if column == "Qwix":
        return peers.qwix_model(model, dtype).apply
    if column.startswith("AQT"):
        return peers.aqt_apply(model, bits, mended=column == "AQT mended")
    assignment = aqs.assign(aqs.find_sites(model.apply, *example), [(".*", fmt)])
    qapply = aqs.quantize(model.apply, execution=column, residuals="codes")  # as jobs do
    return functools.partial(qapply, assignment)


# Programs: what a row builds and runs, for each column.


def random_arrays(column: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Normal arrays; the same ones for every column."""
    rng = np.random.default_rng(0)
    dtype = jnp.bfloat16 if column == "bfloat16" else jnp.float32
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def with_gradients(fun: peers.Binary) -> Callable:
    """The result and both gradients, given the gradient of the result."""

    def run(x, w, gradient):
        y, transpose = jax.vjp(fun, x, w)
        return y, *transpose(gradient)

    return run


def binary_program(column: str, fun: peers.Binary, shapes: tuple, backward: bool) -> Program:
    """A function of (x, w), with its gradients if `backward`."""
    x, w, gradient = random_arrays(column, *shapes)
    return Program(with_gradients(fun), (x, w, gradient)) if backward else Program(fun, (x, w))


def dot_program(
    size: tuple[int, int, int], fmt: str, backward: bool, column: str
) -> Program | None:
    """A matrix product."""
    m, k, n = size
    fun = dot_function(column, fmt, n, backward)
    return fun and binary_program(column, fun, ((m, k), (k, n), (m, n)), backward)


def conv_program(
    size: tuple[int, int, int], depthwise: bool, backward: bool, column: str
) -> Program | None:
    """A convolution of as many channels as it has features."""
    batch, pixels, features = size
    if column == "AQT mended" and not backward:
        return None
    fun = conv_function(column, features, features if depthwise else 1)
    image = (batch, pixels, pixels, features)
    kernel = (3, 3, 1 if depthwise else features, features)
    return binary_program(column, fun, (image, kernel, image), backward)


def served_program(
    size: tuple[int, int, int], fmt: str, static: bool, column: str
) -> Program | None:
    """A matrix product with stored weights and activations that come in float."""
    m, k, n = size
    x, weights = random_arrays(column, (m, k), (k, n))
    served = served_dot(column, weights, fmt, float(jnp.max(jnp.abs(x))) if static else None)
    return served and Program(served[0], (x, served[1]))


def training_step(apply: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """A step of a classifier, with batch statistics or without."""

    def step(params, batch_stats, opt_state, images, labels):
        def loss_of(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = apply(variables, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates.get("batch_stats", {})

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    return step


RESNET_CLASSES = {"cifar": 10, "imagenet": 1000}
RESNET_OPTIMIZER = optax.sgd(0.1, momentum=0.9)


@functools.cache
def resnet_arguments(size: tuple[int, int, int], form: str, abstract: bool) -> tuple[Any, ...]:
    """Parameters, batch statistics, optimizer state, images and labels; shapes if `abstract`."""
    depth, batch, pixels = size
    classes = RESNET_CLASSES[form]

    def arguments():
        keys = jax.random.split(jax.random.key(0), 3)
        images = jax.random.normal(keys[0], (batch, pixels, pixels, 3))
        labels = jax.random.randint(keys[1], (batch,), 0, classes)
        variables = resnet(depth, classes, form=form).init(keys[2], images[:1])
        params = variables["params"]
        return params, variables["batch_stats"], RESNET_OPTIMIZER.init(params), images, labels

    return jax.eval_shape(arguments) if abstract else jax.jit(arguments)()


def resnet_program(
    size: tuple[int, int, int], fmt: str, form: str, abstract: bool, column: str
) -> Program:
    """A training step of a ResNet; to be built only if `abstract`."""
    depth, _, pixels = size
    dtype = jnp.bfloat16 if column == "bfloat16" else jnp.float32
    model = resnet(depth, RESNET_CLASSES[form], form=form, dtype=dtype)
    args = resnet_arguments(size, form, abstract)
    variables = {"params": args[0], "batch_stats": args[1]}
    image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
    apply = quantized_apply(column, model, fmt, variables, image)
    return Program(training_step(apply, RESNET_OPTIMIZER), args)


class MLP(nn.Module):
    """`layers` times relu(x W + b)."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layers to [batch, width]."""
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width)(x))
        return x


def mlp_program(size: tuple[int, int, int], column: str) -> Program | None:
    """The gradient of a deep MLP in int8."""
    layers, batch, width = size
    if column == "AQT mended":
        return None
    model = MLP(layers, width)
    (x,) = random_arrays("float32", (batch, width))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    apply = quantized_apply(column, model, "int8", variables, x)
    return Program(jax.grad(lambda variables, x: apply(variables, x).sum()), (variables, x))


# Measures: what a cell says.


def measure_time(programs: Mapping[str, Program], options: Options) -> Measured:
    """Time of a run, the programs taking turns."""
    outputs, runs = {}, {}
    notes: Notes = []
    for column, program, built in built_programs(programs, notes):
        run = functools.partial(built.compiled, *program.args)
        try:
            outputs[column] = jax.block_until_ready(run())
        except Exception as error:
            notes.append(note_of(column, error))
        else:
            runs[column] = run
    cells = {column: "raises" for column in programs}
    seconds = timing.time_in_turns(runs, timing.rounds_within(runs, options.seconds))
    for column, values in seconds.items():
        cells[column] = f"{timing.median_ratio(values, seconds['float32']):.3f}"
        dead = dead_results(outputs[column], outputs["float32"])
        if dead:
            cells[column] += "!"
            notes.append((column, f"{dead} of its results are all zeros or not finite"))
    return Measured(f"{1e3 * statistics.median(seconds['float32']):.2f} ms", cells, notes)


def measure_build(programs: Mapping[str, Program], options: Options) -> Measured:
    """Time to trace, lower and compile, the programs taking turns."""
    notes: Notes = []
    builds = {
        column: functools.partial(timing.build, jax.jit(program.fun), *program.args)
        for column, program, _ in built_programs(programs, notes)
    }
    cells = {column: "raises" for column in programs}
    results = timing.build_in_turns(builds, options.builds)
    seconds = {column: [b.seconds for b in built] for column, built in results.items()}
    for column, values in seconds.items():
        cells[column] = f"{timing.median_ratio(values, seconds['float32']):.3f}"
    return Measured(f"{statistics.median(seconds['float32']):.2f} s", cells, notes)


def measure_roundings(programs: Mapping[str, Program], options: Options) -> Measured:
    """Roundings in the optimised program: as often as one run of it comes across them."""
    del options
    notes: Notes = []
    cells = {column: "raises" for column in programs}
    for column, _, built in built_programs(programs, notes):
        cells[column] = str(count_instructions(built.compiled.as_text(), "round-nearest-even"))
    return Measured(f"{cells['float32']} times", cells, notes)


def measure_memory(programs: Mapping[str, Program], options: Options) -> Measured:
    """Peak memory of a run as XLA plans it; nothing is run."""
    del options
    notes: Notes = []
    cells = {column: "raises" for column in programs}
    peaks = {c: built.peak_bytes for c, _, built in built_programs(programs, notes)}
    for column, peak in peaks.items():
        cells[column] = f"{peak / peaks['float32']:.3f}"
    return Measured(f"{peaks['float32'] / 1e9:.2f} GB", cells, notes)


def built_programs(
    programs: Mapping[str, Program], notes: Notes
) -> Iterator[tuple[str, Program, timing.Build]]:
    """Every program that can be built; for the others a note is added."""
    for column, program in programs.items():
        try:
            built = timing.build(jax.jit(program.fun), *program.args)
        except Exception as error:
            notes.append(note_of(column, error))
        else:
            yield column, program, built


def note_of(column: str, error: Exception) -> tuple[str, str]:
    """What a column raised; an error of the float32 program is a bug here, and goes on."""
    if column == "float32":
        raise error
    message = str(error).strip().split("\n")[0]
    return column, f"{type(error).__name__}: {message[:160]}"


def dead_results(outputs: Any, references: Any) -> int:
    """How many results are all zero or not finite where the reference's are not."""

    def is_dead(x):
        return not np.any(x) or not np.all(np.isfinite(x))

    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(references), strict=True)
    return sum(
        is_dead(np.asarray(x, np.float32)) and not is_dead(np.asarray(r, np.float32))
        for x, r in pairs
    )


def count_instructions(hlo: str, opcode: str) -> int:
    """Instructions of an opcode in a compiled program; one in a function counts once per call."""
    counts: dict[str, int] = {}
    calls: dict[str, Counter[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            counts[name], calls[name] = 0, Counter()
        elif name:
            counts[name] += bool(re.search(rf" {opcode}\(", line))
            calls[name].update(re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line))

    @functools.cache
    def total(name: str) -> int:
        return counts[name] + sum(times * total(callee) for callee, times in calls[name].items())

    return total(entry)


# The table.


def make_rows(sizes: Sizes) -> list[Row]:
    """All rows; goals after the project's own measurements on two CPU cores."""
    dot = functools.partial(dot_program, sizes.dot, "int8")
    conv = functools.partial(conv_program, sizes.conv, False)
    depthwise = functools.partial(conv_program, sizes.depthwise, True)
    served = functools.partial(served_program, sizes.dot)
    step = functools.partial(resnet_program, sizes.resnet)
    w8a8 = functools.partial(step, "int8", "cifar", False)
    w4a4 = functools.partial(step, "int4", "cifar", False)
    tensors = 2 * (sizes.resnet[0] + 2)  # operands of convolutions, two shortcuts and the head
    large = functools.partial(dot_program, sizes.large_dot)
    memory = functools.partial(resnet_program, sizes.large_resnet, "int8", "imagenet", True)
    both = "forward + backward"
    time, build = measure_time, measure_build
    return [
        Row("dot-forward", "dot int8, forward", "", time, functools.partial(dot, False)),
        Row("dot", f"dot int8, {both}", "<= 0.80", time, functools.partial(dot, True)),
        Row("conv-forward", "conv int8, forward", "<= 0.76", time, functools.partial(conv, False)),
        Row("conv", f"conv int8, {both}", "<= 0.85", time, functools.partial(conv, True)),
        Row("depthwise", f"depthwise int8, {both}", "<= 0.12", time,
            functools.partial(depthwise, True)),
        Row("serving-static", "serving int8, static scale", "<= 0.40", time,
            functools.partial(served, "int8", True)),
        Row("serving-dynamic", "serving int8, dynamic scale", "<= 0.45", time,
            functools.partial(served, "int8", False)),
        Row("serving-int4", "serving int4 weights, int8 act.", "", time,
            functools.partial(served, "int4", True)),
        Row("resnet-w8a8", f"ResNet-{sizes.resnet[0]} step w8a8", "<= 0.62", time, w8a8),
        Row("resnet-w4a4", f"ResNet-{sizes.resnet[0]} step w4a4", "<= 0.62", time, w4a4),
        Row("build-dot", f"build: dot, {both}", "", build, functools.partial(dot, True)),
        Row("build-conv", f"build: conv, {both}", "", build, functools.partial(conv, True)),
        Row("build-resnet", f"build: ResNet-{sizes.resnet[0]} step", "<= 1.15", build, w8a8),
        Row("build-mlp", f"build: {sizes.mlp[0]}-layer MLP gradient", "<= 2", build,
            functools.partial(mlp_program, sizes.mlp)),
        Row("roundings", f"roundings of ResNet-{sizes.resnet[0]} step", f"= {tensors}",
            measure_roundings, w8a8),
        Row("gpu-dot-int8", f"dot {sizes.large_dot[0]}, int8", "", time,
            functools.partial(large, "int8", False), gpu=True),
        Row("gpu-dot-fp8", f"dot {sizes.large_dot[0]}, e4m3", "", time,
            functools.partial(large, "e4m3", False), gpu=True),
        Row("gpu-memory", f"memory: ResNet-{sizes.large_resnet[0]} step", "", measure_memory,
            memory, gpu=True),
    ]  # fmt: skip


def measure_row(row: Row, options: Options) -> Measured:
    """Makes a row's programs and measures them."""
    programs, cells, notes = {}, {}, []
    for column in shown_columns():
        if not peers.is_installed(column):
            cells[column] = "absent"
            continue
        try:
            program = row.make(column)
        except Exception as error:
            notes.append(note_of(column, error))
            cells[column] = "raises"
        else:
            if program is not None:
                programs[column] = program
    measured = row.measure(programs, options)
    return Measured(measured.base, cells | measured.cells, notes + measured.notes)


def shown_columns() -> list[str]:
    """The columns of the table: bfloat16 is no baseline on a CPU."""
    return [c for c in COLUMNS if c != "bfloat16" or jax.default_backend() != "cpu"]


def select_rows(rows: list[Row], names: list[str] | None) -> list[Row]:
    """The rows named, or all that the backend is meant for.

    Raises:
      SystemExit: a name of no row.
    """
    unknown = sorted(set(names or ()) - {row.name for row in rows})
    if unknown:
        raise SystemExit(
            f"no row {', '.join(unknown)}; rows are: {', '.join(row.name for row in rows)}"
        )
    if names:
        return [row for row in rows if row.name in names]
    return [row for row in rows if not row.gpu or jax.default_backend() == "gpu"]


def print_row(title: str, goal: str, cells: list[str]) -> None:
    """A line of the table."""
    print(f"{title:36} {goal:>8}", *(f"{cell:>10}" for cell in cells), flush=True)


def main() -> None:
    """Runs the benchmark of the command line."""
    names = ", ".join(row.name for row in make_rows(FULL))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"rows: {names}")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    parser.add_argument("--only", action="append", metavar="NAME", help="a row; may be repeated")
    parser.add_argument("--seconds", type=float, default=30, help="of counted rounds per row")
    parser.add_argument("--builds", type=int, default=5, help="counted builds per program")
    args = parser.parse_args()
    options = Options(1, 1) if args.quick else Options(args.seconds, args.builds)
    rows = select_rows(make_rows(QUICK if args.quick else FULL), args.only)
    columns = shown_columns()
    print(f"{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print_row("ratios to float32", "goal", columns)
    for row in rows:
        measured = measure_row(row, options)
        cells = measured.cells | {"float32": measured.base}
        print_row(row.title, row.goal, [cells.get(column, "-") for column in columns])
        for text in dict.fromkeys(text for _, text in measured.notes):
            named = ", ".join(column for column, other in measured.notes if other == text)
            print(f"    {named}: {text}", flush=True)


if __name__ == "__main__":
    main()
