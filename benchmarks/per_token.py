"""One scale for a tensor of activations beside one per token: what either costs, and its error.

    python -m benchmarks.per_token              # about two minutes on two CPU cores
    python -m benchmarks.per_token --quick      # small shapes, to see that it runs

Times are ratios to the same product with one scale per tensor, all programs of a row in turns in
one process (`benchmarks.timing`). Errors are those of the logits of a vision transformer in w8a8,
relative to float32: ||quantized - float|| / ||float||. Its weights are random; with outliers one
hidden unit of every MLP is 30 times as large, by a sign and size that are the token's own.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aqt_search as aqs
from aqt_search.models.vit import ViT
from benchmarks import timing
from benchmarks.peers import MATRIX_PRODUCT

GRANULARITIES = {"tensor": aqs.PER_TENSOR, "token": aqs.PER_TOKEN}
EXECUTIONS = ("emulated", "native", "auto")


# --- Times ----------------------------------------------------------------------------------------


def dot(granularity: aqs.Granularity, execution: str, weights: Any) -> Callable:
    """x [m, k] times stored or float weights [k, n], both in int8."""
    own = None if isinstance(weights, aqs.QTensor) else "int8"
    return functools.partial(
        aqs.dot_general, dimension_numbers=MATRIX_PRODUCT, rhs_format=own, execution=execution,
        lhs_format=aqs.Quantizer("int8", granularity),
    )  # fmt: skip


def with_gradients(fun: Callable) -> Callable:
    """The result and both gradients, given the gradient of the result."""

    def run(x, w, gradient):
        y, transpose = jax.vjp(fun, x, w)
        return y, *transpose(gradient)

    return run


def rows(size: tuple[int, int, int]) -> Iterator[tuple[str, str, Callable, tuple]]:
    """(row, granularity, function, arguments) of all that is timed."""
    m, k, n = size
    rng = np.random.default_rng(0)
    x, w, gradient = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((m, k), (k, n), (m, n))
    )
    stored = aqs.quantize_tensor(w, "int8", channel_axes=(1,))
    for execution in EXECUTIONS:
        for name, granularity in GRANULARITIES.items():
            served = dot(granularity, execution, stored)
            yield f"serving int8, {execution}", name, served, (x, stored)
        for name, granularity in GRANULARITIES.items():
            trained = with_gradients(dot(granularity, execution, w))
            yield f"forward + backward, {execution}", name, trained, (x, w, gradient)


def print_times(size: tuple[int, int, int], seconds: float) -> None:
    """A line for each row: milliseconds per tensor, and the ratio of per token to it."""
    programs: dict[str, dict[str, Callable]] = {}
    for row, name, fun, args in rows(size):
        compiled = jax.jit(fun).lower(*args).compile()
        programs.setdefault(row, {})[name] = functools.partial(compiled, *args)
    print(f"[{size[0]}, {size[1]}] x [{size[1]}, {size[2]}]           per tensor   per token")
    for row, runs in programs.items():
        times = timing.time_in_turns(runs, timing.rounds_within(runs, seconds))
        ratio = timing.median_ratio(times["token"], times["tensor"])
        print(f"{row:30} {1e3 * np.median(times['tensor']):10.2f} ms {ratio:10.3f}")


# --- Errors ---------------------------------------------------------------------------------------

OUTLIER = 30.0


def small_transformer(outliers: bool) -> tuple[ViT, Any, jax.Array]:
    """A model, its random variables, and images; of each MLP one hidden unit may be an outlier."""
    model = ViT(channels=64, heads=2, blocks=4, patch=4, num_classes=10)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16, 16, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    params = dict(variables["params"])
    for name in params:
        if outliers and name.startswith("block"):
            up = params[name]["up"]
            kernel = up["kernel"].at[:, 0].multiply(OUTLIER)
            params[name] = params[name] | {"up": up | {"kernel": kernel}}
    return model, {"params": params}, x


def relative_error(granularity: aqs.Granularity, outliers: bool) -> float:
    """||quantized - float|| / ||float|| of the logits in w8a8."""
    model, variables, x = small_transformer(outliers)
    spec = {"activation": aqs.Quantizer("int8", granularity), "weight": "int8"}
    assignment = aqs.assign(aqs.find_sites(model.apply, variables, x), [(".*", spec)])
    exact = jax.jit(model.apply)(variables, x)
    found = jax.jit(aqs.quantize(model.apply))(assignment, variables, x)
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


def print_errors() -> None:
    """A line for either kind of activations."""
    print("w8a8 of a small ViT, relative error    per tensor   per token")
    for outliers, title in ((False, "random weights"), (True, "a hidden unit 30 times as large")):
        errors = [relative_error(granularity, outliers) for granularity in GRANULARITIES.values()]
        print(f"{title:36} {errors[0]:12.4f} {errors[1]:11.4f}")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    quick = parser.parse_args().quick
    print_times((256, 128, 128) if quick else (2048, 512, 512), 1.0 if quick else 15.0)
    print_errors()


if __name__ == "__main__":
    main()
