"""What the MobileNets take for each of their blocks or stages."""

from collections.abc import Sequence


def per_block(name: str, values: Sequence[int] | int, count: int) -> tuple[int, ...]:
    """One value for each of `count` blocks; windows are odd, all values at least 1.

    Raises:
        ValueError: another number of values, or one that cannot be.
    """
    given = (values,) * count if isinstance(values, int) else tuple(values)
    odd = name == "windows"
    if len(given) != count or any(
        not isinstance(v, int) or v < 1 or (odd and v % 2 == 0) for v in given
    ):
        raise ValueError(
            f"{name} are {values!r}; expected {'an odd' if odd else 'a'} number of at least 1 for"
            f" each of the {count} blocks, or one for all"
        )
    return given


def per_stage(name: str, values: Sequence[int] | None, published: Sequence[int]) -> tuple[int, ...]:
    """One value of at least 1 for each stage; as published where there are none.

    Raises:
        ValueError: another number of values, or one below 1.
    """
    given = tuple(published if values is None else values)
    if len(given) != len(published) or any(not isinstance(v, int) or v < 1 for v in given):
        raise ValueError(
            f"{name} are {values!r}; expected a number of at least 1 for each of the"
            f" {len(published)} stages, such as {tuple(published)}"
        )
    return given
