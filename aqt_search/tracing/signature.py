"""Signatures of functions that stand for another with other first arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

_FIRST = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def named_after(fun: Callable, *first: str) -> Callable[[Callable], Callable]:
    """Names a function after `fun`, of whose arguments it takes others in place of the first.

    Its signature says so: jax.jit looks `static_argnames` up in it, and others bind by it.
    `functools.wraps` alone would show that of `fun`.

    Args:
      fun: a function; one without a signature gives its names alone.
      first: the names of the arguments in place of its first.
    """

    def name(function: Callable) -> Callable:
        named = functools.wraps(fun, ("__name__", "__qualname__", "__doc__"), ())(function)
        del named.__wrapped__
        try:
            own = inspect.signature(fun)
        except (TypeError, ValueError):
            return named
        rest = list(own.parameters.values())
        rest = rest[1:] if rest and rest[0].kind in _FIRST else rest
        kind = _FIRST[0] if rest and rest[0].kind is _FIRST[0] else _FIRST[1]
        taken = {parameter.name for parameter in rest}
        leading = [inspect.Parameter(f"{n}_" if n in taken else n, kind) for n in first]
        named.__dict__["__signature__"] = own.replace(parameters=[*leading, *rest])
        return named

    return name
