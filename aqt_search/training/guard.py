"""Watches a search for the point where its reward stops to depend on quality."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


class CollapsedSearchError(RuntimeError):
    """The reward no longer depends on quality: the search would go on optimising cost alone."""


class QualityGuard:
    """Stops a search whose quality says nothing about the formats any more.

    Over the last `window` steps after the delay, it raises if every batch got one and the same
    prediction, or if the mean accuracy is not above chance by three standard errors. (Seen with
    int2: activations all zero, BatchNorm divides by zero variance, accuracy stays at chance.)
    """

    def __init__(self, start: int, classes: int, examples: int, window: int = 50):
        self._start, self.window = start, window  # steps in the delay, and looked at
        chance = 1 / classes
        error = math.sqrt(chance * (1 - chance) / (window * examples))
        self._threshold = chance + 3 * error
        self._accuracies: collections.deque = collections.deque(maxlen=window)
        self._agreements: collections.deque = collections.deque(maxlen=window)

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Looks at the metrics of one step (counted from 1)."""
        if step <= self._start:
            return
        self._accuracies.append(float(metrics["sample_accuracy"]))
        self._agreements.append(float(metrics["prediction_agreement"]))
        if len(self._accuracies) < self.window:
            return
        mean = float(np.mean(self._accuracies))
        same = min(self._agreements) >= 1
        if same or mean <= self._threshold:
            what = "every batch got one and the same prediction" if same else (
                f"the mean accuracy {mean:.4f} is not above chance ({self._threshold:.4f})"
            )  # fmt: skip
            raise CollapsedSearchError(
                f"At step {step} the reward no longer depends on quality: over the last"
                f" {len(self._accuracies)} steps {what}. Leave the narrowest formats (int2) out of"
                " the space, or lower the learning rate, in a new --workdir. The checkpoint before"
                " this step is kept."
            )
