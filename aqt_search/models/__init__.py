"""The zoo: plain Flax networks by name, with no quantization inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from aqt_search.models.efficientnet import VARIANTS as EFFICIENTNETS
from aqt_search.models.efficientnet import efficientnet
from aqt_search.models.inception_v3 import inception_v3
from aqt_search.models.mobilenet_v1 import mobilenet_v1
from aqt_search.models.mobilenet_v2 import mobilenet_v2
from aqt_search.models.mobilenet_v3 import VARIANTS as MOBILENET_V3S
from aqt_search.models.mobilenet_v3 import mobilenet_v3
from aqt_search.models.resnet import CIFAR_STAGES, IMAGENET_STAGES, resnet
from aqt_search.models.vit import SIZES as VITS
from aqt_search.models.vit import deit, vit

__all__ = [
    "MODELS",
    "build",
    "deit",
    "efficientnet",
    "inception_v3",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3",
    "resnet",
    "vit",
]


def _without_batch_statistics(build: Callable[..., Any]) -> Callable[..., Any]:
    """A builder that takes, and has no use for, the axis that batch statistics are shared over."""

    def built(num_classes: int, *, axis_name: str | None = None, **options: Any) -> Any:
        return build(num_classes, **options)

    return built


# name -> builder(num_classes, *, form, width, dtype, axis_name, ...)
MODELS: Mapping[str, Callable[..., Any]] = {
    **{f"resnet{d}": functools.partial(resnet, d) for d in (*CIFAR_STAGES, *IMAGENET_STAGES)},
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    **{f"mobilenet_v3_{v}": functools.partial(mobilenet_v3, v) for v in MOBILENET_V3S},
    **{f"efficientnet_{v}": functools.partial(efficientnet, v) for v in EFFICIENTNETS},
    "inception_v3": inception_v3,
    **{f"vit_{s}": _without_batch_statistics(functools.partial(vit, s)) for s in VITS},
    **{f"deit_{s}": _without_batch_statistics(functools.partial(deit, s)) for s in VITS},
}


def build(name: str, num_classes: int, **options: Any) -> Any:
    """Builds a network of `MODELS`.

    Args:
      name: such as "resnet20".
      num_classes: number of logits.
      **options: `form` ("imagenet", "cifar" for small images, and others that a network may have),
        `width` (multiplies the channels), `dtype` of the computation, `axis_name` that batch
        statistics are averaged over, and what else the network's own builder takes.

    Raises:
      ValueError: unknown name, or a value that the network cannot have.
      TypeError: an option that the network's builder does not take.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(MODELS)}")
    return MODELS[name](num_classes, **options)
