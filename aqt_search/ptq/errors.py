"""What post-training quantization complains of."""


class PTQError(ValueError):
    """Input that a step of post-training quantization cannot work with."""


class SkippedSite(UserWarning):
    """A site that a step leaves as it is; the message names it and says why."""
