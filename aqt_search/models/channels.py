"""Channel counts of networks that are scaled by a width multiplier."""

import math


def round_channels(channels: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor` to `channels` that loses at most a tenth of them.

    n = max(divisor, divisor * floor(channels / divisor + 1/2)), and n + divisor instead where
    n < 0.9 * channels. The rule of the MobileNetV2, MobileNetV3 and EfficientNet reference code,
    so that published parameter counts hold at every width.

    Args:
      channels: channels of the layer times the width multiplier, above 0.
      divisor: the result is a multiple of this, at least 1.

    Raises:
      ValueError: channels not finite or not above 0, or a divisor below 1.
    """
    if not (math.isfinite(channels) and channels > 0):
        raise ValueError(
            f"channels is {channels!r}; expected a finite number above 0. Check the width."
        )
    if divisor < 1:
        raise ValueError(
            f"divisor is {divisor!r}; expected a whole number of at least 1, such as 8"
        )
    rounded = max(divisor, divisor * math.floor(channels / divisor + 0.5))
    return rounded + divisor if rounded < 0.9 * channels else rounded
