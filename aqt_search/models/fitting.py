"""The network of the zoo that variables belong to, where these were cut out of a larger one's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from aqt_search.models.mobilenet_v2 import MobileNetV2
from aqt_search.models.mobilenet_v3 import MobileNetV3

FITTED = (MobileNetV2, MobileNetV3)


def fitted(model: Any, variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A plain model and its variables, of what is left of a larger model's.

        model2, variables2 = fitted(model, net.extract(choices, variables))

    Channels and windows are read from the shapes; blocks that are not there are left out, and those
    behind them move up: block 5 is `block4` where block 4 is gone.

    Args:
        model: the whole model, a `MobileNetV2` or `MobileNetV3`.
        variables: what is left of its variables: dictionaries.

    Raises:
        TypeError: another model, whose own builder has to be told.
    """
    if not isinstance(model, FITTED):
        raise TypeError(
            f"{type(model).__name__} has no blocks of which this could build a smaller one;"
            " expected a MobileNetV2 or MobileNetV3. Build the smaller model by hand: the shapes of"
            " its variables are those of `variables`."
        )
    params = variables["params"]
    kept = [number for number in range(len(model.blocks)) if f"block{number + 1}" in params]
    added = _adds(model)
    blocks = tuple(
        _fitted_block(model.blocks[number], params[f"block{number + 1}"], added[number])
        for number in kept
    )
    sizes = {"stem_channels": _outputs(params["stem"]), "last_channels": _outputs(params["last"])}
    if isinstance(model, MobileNetV3):
        sizes["hidden_channels"] = _outputs(params["hidden"])
    names = {f"block{number + 1}": f"block{new}" for new, number in enumerate(kept, start=1)}
    renamed = {
        collection: {names.get(name, name): part for name, part in parts.items()}
        for collection, parts in variables.items()
    }
    return dataclasses.replace(model, blocks=blocks, **sizes), renamed


def _outputs(layer: Mapping[str, Any]) -> int:
    return layer["kernel"].shape[-1]


def _adds(model: MobileNetV2 | MobileNetV3) -> list[bool]:
    """Whether each block adds its input, as the whole model has it."""
    inputs = [model.stem_channels, *(block.channels for block in model.blocks)]
    return [
        block.stride == 1 and block.channels == before if block.adds is None else block.adds
        for block, before in zip(model.blocks, inputs)
    ]


def _fitted_block(block: Any, params: Mapping[str, Any], adds: bool) -> Any:
    window, _, _, expanded = params["depthwise"]["kernel"].shape
    channels = _outputs(params["project"])
    own = {"squeezed": _outputs(params["squeeze"])} if "squeeze" in params else {}
    return block._replace(
        window=window, expanded=expanded, channels=channels, expands="expand" in params, adds=adds,
        **own,
    )  # fmt: skip
