"""Published architecture spaces, as what `elastic` takes for a network of the zoo.

    choices = architecture("fliqnas_mobilenet_v2", model)
    net = elastic(model.apply, variables, images, **choices)

The model is the largest of the space: built with its largest windows, expansions, depths and
width. The forms of the papers are for 224 x 224 pixels; "small" ones for 16 to 32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aqt_search.architecture.decisions import Times
from aqt_search.architecture.errors import ArchitectureError


def architecture(name: str, model: Any) -> dict[str, Any]:
    """Keyword arguments of `elastic`: widths, kernels and depths of a named space.

    Args:
      name: one of `NAMED_SPACES`.
      model: the largest network of the space, a MobileNetV2 or MobileNetV3 of the zoo.

    Raises:
      ArchitectureError: an unknown name, or a model without blocks.
    """
    if name not in NAMED_SPACES:
        raise ArchitectureError(
            f"Unknown architecture space {name!r}: expected one of {', '.join(NAMED_SPACES)}."
        )
    blocks = getattr(model, "blocks", None)
    if not blocks or not hasattr(blocks[0], "window"):
        raise ArchitectureError(
            f"The architecture space {name!r} is of a MobileNetV2 or MobileNetV3; got a"
            f" {type(model).__name__}."
        )
    return NAMED_SPACES[name](model)


def _stages(model: Any) -> list[list[int]]:
    """The numbers of the blocks of every stage: one that does not add its input starts a stage."""
    stages: list[list[int]] = []
    makers = _makers(model)
    for number, maker in enumerate(makers[1:], start=1):
        if number == 1 or maker != makers[number - 1]:
            stages.append([])
        stages[-1].append(number)
    return stages


def _makers(model: Any) -> list[str]:
    """For the stem and every block, the convolution that names the group of its channels.

    A block that adds its input has the channels of the block before it.
    """
    makers, channels = ["stem"], model.stem_channels
    for number, block in enumerate(model.blocks, start=1):
        same = block.stride == 1 and block.channels == channels
        adds = same if block.adds is None else block.adds
        makers.append(makers[-1] if adds else f"block{number}/project")
        channels = block.channels
    return makers


def _depths(model: Any, least: int) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Of every stage of more than `least` blocks, how many it has."""
    return [
        (tuple(f"block{n}" for n in stage), tuple(range(least, len(stage) + 1)))
        for stage in _stages(model)
        if len(stage) > least
    ]


def _inverted_residuals(
    *, windows: Sequence[int], ratios: Sequence[int], shares: Sequence[float], least: int,
    divisor: int,
) -> Callable[[Any], dict[str, Any]]:  # fmt: skip
    """A space of MobileNetV2: filters of every stage, expansion and window of every block, depths.

    Args:
      windows: of the depthwise convolutions; () leaves them alone.
      ratios: expansions; those of blocks without one stay.
      shares: of the largest number of filters of a stage; () leaves them alone.
      least: blocks of every stage.
      divisor: filters are multiples of it.
    """

    def of(model: Any) -> dict[str, Any]:
        makers, widths = _makers(model), {}
        sizes = [model.stem_channels, *(block.channels for block in model.blocks)]
        for maker, size in zip(makers, sizes):
            options = dict.fromkeys(
                max(divisor, divisor * round(size * share / divisor)) for share in shares
            )
            if len(options) > 1:
                widths[f"^{maker}/kernel$"] = tuple(options)
        kernels = {}
        for number, (block, of) in enumerate(zip(model.blocks, makers), start=1):
            if windows:
                kernels[f"^block{number}/depthwise/"] = tuple(windows)
            if block.expanded > sizes[number - 1]:
                widths[f"^block{number}/expand/kernel$"] = Times(f"^{of}/kernel$", tuple(ratios))
        return {"widths": widths, "kernels": kernels, "depths": _depths(model, least)}

    return of


def _squeezed(
    *, windows: Sequence[int], ratios: Sequence[int], least: int
) -> Callable[[Any], dict[str, Any]]:
    """A space of MobileNetV3: windows and expansions of every block but the first, and depths.

    Squeeze and excitation has a quarter of the expanded channels, rounded.

    Args:
      windows: of the depthwise convolutions, none above the block's own.
      ratios: expansions, none above the block's own.
      least: blocks of every stage.
    """

    def of(model: Any) -> dict[str, Any]:
        if not hasattr(model.blocks[0], "squeezed"):
            raise ArchitectureError(
                f"This space is of a MobileNetV3; a {type(model).__name__} has no squeeze and"
                " excitation. Take a space of MobileNetV2."
            )
        widths: dict[Any, Any] = {}
        inputs = [model.stem_channels, *(block.channels for block in model.blocks)]
        for number, (block, channels) in enumerate(zip(model.blocks, inputs), start=1):
            if block.expanded == channels:
                continue
            sizes = [r * channels for r in ratios if r * channels <= block.expanded]
            expand = f"^block{number}/expand/kernel$"
            if block.squeezed:
                squeeze = f"^block{number}/squeeze/kernel$"
                widths[expand, squeeze] = tuple((size, _quarter(size)) for size in sizes)
            else:
                widths[expand] = tuple(sizes)
        kernels = {
            f"^block{n}/depthwise/": tuple(k for k in windows if k <= block.window)
            for n, block in enumerate(model.blocks[1:], start=2)
        }
        return {"widths": widths, "kernels": kernels, "depths": _depths(model, least)}

    return of


def _quarter(channels: int) -> int:
    """A quarter, to a multiple of 8 that loses at most a tenth: as the zoo's blocks round it."""
    quarter = channels // 4
    rounded = max(8, 8 * ((quarter + 4) // 8))
    return rounded + 8 if rounded < 0.9 * quarter else rounded


NAMED_SPACES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    # FLIQNAS (arXiv 2308.03290): windows, expansions and filters of MobileNetV2. The paper's table
    # of options is not at hand; these are TuNAS's (Bender et al. 2020, arXiv 2008.06120).
    "fliqnas_mobilenet_v2": _inverted_residuals(
        windows=(3, 5, 7), ratios=(3, 6), shares=(0.25, 0.3125, 0.375, 0.5, 0.625, 0.75, 1.0),
        least=1, divisor=8,
    ),
    # TuNAS's space of ProxylessNAS: windows, expansions, skipped blocks; filters as they are.
    "tunas_mobilenet_v2": _inverted_residuals(
        windows=(3, 5, 7), ratios=(3, 6), shares=(), least=1, divisor=8
    ),
    # Once-for-all's (Cai et al. 2020, arXiv 1908.09791), but for the resolution.
    "ofa_mobilenet_v3": _squeezed(windows=(3, 5, 7), ratios=(3, 4, 6), least=2),
    # Ours, for 16 to 32 pixels on a CPU: forms "tiny" and "cifar" with windows of 5.
    "small_mobilenet_v2": _inverted_residuals(
        windows=(3, 5), ratios=(2, 4, 6), shares=(0.5, 0.75, 1.0), least=1, divisor=4
    ),
    "small_mobilenet_v2_own_windows": _inverted_residuals(
        windows=(), ratios=(2, 4, 6), shares=(0.5, 0.75, 1.0), least=1, divisor=4
    ),
    "small_mobilenet_v3": _squeezed(windows=(3, 5), ratios=(2, 4, 6), least=1),
}  # fmt: skip
