"""Quantization as a function transformation: `find_sites` and `quantize`.

    sites = find_sites(apply, params, x)                   # what there is to quantize; no FLOPs
    logits = quantize(apply)(assignment, params, x)        # apply with formats as one more argument

`apply` is any JAX function of parameters and data. It is traced to a jaxpr, the operands of its
products are fake-quantized, and everything else runs as it was written, so the result can be
jitted, differentiated, vmapped (over assignments, too) and pmapped like any other function.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np

from aqt_search import sites as site_analysis
from aqt_search.fake_quant import carrier_dtype, fake_quant_packed, pack_grids
from aqt_search.formats import NumericFormat
from aqt_search.sites import Path, Site, SiteError, SiteFormats

Assignment = Mapping[str, SiteFormats]


class _Trace(NamedTuple):
    closed: jex_core.ClosedJaxpr
    inputs: list[Any]  # the array leaves of params and data, in the jaxpr's order
    out_tree: jax.tree_util.PyTreeDef
    sites: dict[str, Site]
    site_paths: dict[Path, str]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _trace(
    fun: Callable, params: Any, args: tuple, kwargs: dict, axis_sizes: Mapping[Hashable, int]
) -> _Trace:
    """Traces `fun(params, *args, **kwargs)`; leaves that are no arrays stay Python values."""
    paths_and_leaves, tree = jax.tree_util.tree_flatten_with_path((params, args, kwargs))
    leaves = [leaf for _, leaf in paths_and_leaves]
    arrays = [index for index, leaf in enumerate(leaves) if _is_array(leaf)]

    def flat_fun(*values):
        filled = list(leaves)
        for index, value in zip(arrays, values):
            filled[index] = value
        inner_params, inner_args, inner_kwargs = jax.tree_util.tree_unflatten(tree, filled)
        return fun(inner_params, *inner_args, **inner_kwargs)

    inputs = [leaves[index] for index in arrays]
    make = jax.make_jaxpr(flat_fun, axis_env=list(axis_sizes.items()), return_shape=True)
    try:
        closed, out_shape = make(*inputs)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise SiteError(
            f"The function uses a mapped axis that is not bound here ({error}). Call it under the"
            " pmap or vmap that names the axis, or, to find sites outside of it, pass"
            " axis_sizes={'name': 1} to find_sites."
        ) from error
    names = [
        site_analysis.parameter_name(path[1:]) if path[0].idx == 0 else None
        for path, leaf in paths_and_leaves
        if _is_array(leaf)
    ]
    sites, site_paths = site_analysis.analyze(closed.jaxpr, names)
    return _Trace(closed, inputs, jax.tree_util.tree_structure(out_shape), sites, site_paths)


def find_sites(
    fun: Callable,
    params: Any,
    *args: Any,
    axis_sizes: Mapping[Hashable, int] | None = None,
    **kwargs: Any,
) -> dict[str, Site]:
    """Lists the products of `fun(params, *args, **kwargs)` that can be quantized.

    A site is a `dot_general` or `conv_general_dilated` on floating-point operands, at least one of
    which depends on data, and whose result is used. An operand is a weight if it depends on
    parameters and on no data; its site is named by the parameter leaf it comes from
    (`stage1/conv/kernel`). A product of two activations is named by its place: its name scopes and
    the primitive (`encoder/attention/dot_general`). Sites of equal name are numbered in program
    order: `embedding#1`, `embedding#2`.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`. Arguments that are no arrays (bools,
    strings, numbers, functions) are passed on as they are.

    Args:
      fun: a function of parameters and data, such as a Linen module's `apply`.
      params: its first argument: parameters (with other variables, if `fun` takes them together).
      *args: the data; use a batch of one to count multiply-accumulates per example.
      axis_sizes: sizes of mapped axes that `fun` names, to trace it outside of their pmap.
      **kwargs: keyword arguments of `fun`.

    Returns:
      The sites by name, in program order. A site with `refused` set cannot be quantized.

    Raises:
      SiteError: `fun` names a mapped axis that is not bound.
    """
    return _trace(fun, params, args, kwargs, axis_sizes or {}).sites


def quantize(fun: Callable, *, axis_name: Hashable | None = None) -> Callable:
    """Returns `qfun(assignment, params, *args, **kwargs)`: `fun` with fake-quantized products.

    At a site with formats (f, g) the product of lhs and rhs becomes that of `fake_quant(lhs, f)`
    and `fake_quant(rhs, g)`: one scale per output channel for weights and constants, one per tensor
    for activations. Where the assignment has no entry, or None, the operand is left as it is;
    with an empty assignment `qfun` is exactly `fun`.

    Formats may be traced: a jitted `qfun` is compiled once for all formats. It is traced anew only
    if operands change between a format and None.

    Args:
      fun: a function of parameters and data; see `find_sites`.
      axis_name: a mapped axis that shards the batch; activation scales are then shared over it, so
        that the result does not depend on the number of devices.

    Raises (when called):
      SiteError: the assignment names a site that does not exist, holds something other than
        `SiteFormats`, or quantizes a site that is refused.
    """

    @functools.wraps(fun, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def quantized(assignment: Assignment, params: Any, *args: Any, **kwargs: Any) -> Any:
        trace = _trace(fun, params, args, kwargs, {})
        _check_assignment(assignment, trace.sites)
        run = _Interpreter(trace, assignment, axis_name)
        outputs = run.evaluate(trace.closed.jaxpr, trace.closed.consts, trace.inputs, ())
        return jax.tree_util.tree_unflatten(trace.out_tree, outputs)

    return quantized


def _are_formats(value: Any) -> bool:
    return isinstance(value, SiteFormats) and all(
        fmt is None or isinstance(fmt, NumericFormat) for fmt in value
    )


def _check_assignment(assignment: Assignment, sites: Mapping[str, Site]) -> None:
    for name, formats in assignment.items():
        if name not in sites:
            near = difflib.get_close_matches(name, sites, n=3, cutoff=0.4)
            raise SiteError(
                f"The assignment names site {name!r}, which the function does not have."
                f" Nearest: {', '.join(near or list(sites)[:3]) or 'it has no sites'}."
            )
        if not _are_formats(formats):
            raise SiteError(
                f"Site {name!r} is assigned {formats!r}; expected SiteFormats(lhs, rhs) of a"
                " NumericFormat or None each. Use aqt_search.assign to build one from names."
            )
        if sites[name].refused and formats != SiteFormats():
            raise SiteError(
                f"Site {name!r} cannot be quantized: {sites[name].refused}. Assign it None, or move"
                " the product out of there."
            )


class _Interpreter:
    """Runs a traced function again, with the operands of its sites quantized."""

    def __init__(self, trace: _Trace, assignment: Assignment, axis_name: Hashable | None):
        self._sites = trace.sites
        self._assignment = assignment
        self._axis_name = axis_name
        # Only sites with formats change anything: the rest of the program runs as it is.
        self._site_paths = {
            path: name
            for path, name in trace.site_paths.items()
            if assignment.get(name, SiteFormats()) != SiteFormats()
        }
        # All formats go into one array: an array per operand would cost a kernel each.
        formats = {
            (name, side): fmt
            for name in self._site_paths.values()
            for side, fmt in assignment[name]._asdict().items()
            if fmt is not None
        }
        self._rows = {key: np.int32(row) for row, key in enumerate(formats)}
        dtypes = {carrier_dtype(o) for s in trace.sites.values() for o in (s.lhs, s.rhs)}
        self._grids = {d: pack_grids(list(formats.values()), d) for d in dtypes} if formats else {}
        self._entered = {path[:end] for path in self._site_paths for end in range(len(path))}

    def evaluate(self, jaxpr: jex_core.Jaxpr, consts: Sequence, args: Sequence, path: Path) -> list:
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))

        def read(atom):
            return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            here = path + (index,)
            operands = [read(v) for v in eqn.invars]
            if here in self._site_paths:
                outputs = [self._site(self._site_paths[here], eqn, operands)]
            elif here in self._entered:
                outputs = self._enter(eqn, operands, here)
            else:
                outputs = _run_equation(jaxpr, eqn, operands)
            env.update(zip(eqn.outvars, outputs))
        return [read(v) for v in jaxpr.outvars]

    def _site(self, name: str, eqn: jex_core.JaxprEqn, operands: Sequence) -> jax.Array:
        site = self._sites[name]
        with jax.named_scope(name):
            quantized = [
                self._operand(x, getattr(site, side), (name, side))
                for x, side in zip(operands, SiteFormats._fields)
            ]
            return eqn.primitive.bind(*quantized, **eqn.params)

    def _operand(self, x: jax.Array, operand: site_analysis.Operand, key: tuple) -> jax.Array:
        if key not in self._rows:
            return x
        axis_name = self._axis_name if operand.role == "activation" else None
        grids = self._grids[carrier_dtype(x)]
        return fake_quant_packed(x, grids, self._rows[key], operand.channel_axes, axis_name)

    def _enter(self, eqn: jex_core.JaxprEqn, operands: Sequence, here: Path) -> list:
        name = eqn.primitive.name
        if name == "scan":
            return self._enter_scan(eqn, operands, here)
        if name == "while":
            return self._enter_while(eqn, operands, here)
        if name == "cond":
            branches = [
                functools.partial(self._body, body, here + (number,))
                for number, body in enumerate(site_analysis.sub_jaxprs(eqn))
            ]
            return jax.lax.switch(operands[0], branches, *operands[1:])
        (body,) = site_analysis.sub_jaxprs(eqn)
        run = functools.partial(self._body, body, here + (0,))
        if name in site_analysis.REMAT_CALLS:
            keep = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
            run = jax.checkpoint(run, **keep)
        else:
            assert name in site_analysis.INLINED_CALLS, name
        return run(*operands)

    def _body(self, body, path: Path, *args) -> list:
        jaxpr, consts = body
        return self.evaluate(jaxpr, consts, args, path)

    def _enter_scan(self, eqn: jex_core.JaxprEqn, operands: Sequence, here: Path) -> list:
        (body,) = site_analysis.sub_jaxprs(eqn)
        const_count, carries = site_analysis.scan_counts(eqn)
        consts, carry, xs = _split(operands, const_count, carries)

        def step(carry, xs):
            outputs = self._body(body, here + (0,), *consts, *carry, *xs)
            return tuple(outputs[:carries]), tuple(outputs[carries:])

        keep = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(step, tuple(carry), tuple(xs), **keep)
        return [*carry, *ys]

    def _enter_while(self, eqn: jex_core.JaxprEqn, operands: Sequence, here: Path) -> list:
        # Parameters in sorted order: body_jaxpr comes before cond_jaxpr.
        body, test = site_analysis.sub_jaxprs(eqn)
        test_consts, body_consts, carry = _split(
            operands, eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        )
        return list(
            jax.lax.while_loop(
                lambda carry: self._body(test, here + (0,), *test_consts, *carry)[0],
                lambda carry: tuple(self._body(body, here + (1,), *body_consts, *carry)),
                tuple(carry),
            )
        )


def _split(values: Sequence, *sizes: int) -> list[list]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return [*parts, list(values[start:])]


def _run_equation(jaxpr: jex_core.Jaxpr, eqn: jex_core.JaxprEqn, operands: Sequence) -> list:
    """Runs one equation of `jaxpr` as it was traced, its custom derivative rules included.

    A jaxpr of this one equation is evaluated, because binding a call-like primitive again takes
    parameters whose form differs between JAX versions.
    """
    inputs = {v: x for v, x in zip(eqn.invars, operands) if not isinstance(v, jex_core.Literal)}
    alone = jaxpr.replace(
        constvars=(), invars=list(inputs), outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects
    )
    return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(alone, ()))(*inputs.values())
