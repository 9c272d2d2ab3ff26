"""The convolution that the zoo's networks with BatchNorm are made of."""

from typing import Any

import flax.linen as nn


def convolution(
    features: int, window: int, stride: int = 1, *, groups: int = 1, dtype: Any, name: str
) -> nn.Conv:
    """Convolution without bias and with (window - 1) / 2 rows of zeros on every side."""
    return nn.Conv(
        features,
        (window, window),
        strides=(stride, stride),
        padding=(window - 1) // 2,
        feature_group_count=groups,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )
