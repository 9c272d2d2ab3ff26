"""The handwritten digits that come with scikit-learn, as a TFDS data set."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """1,797 grey images of 8 x 8 pixels in 10 classes; 1,437 to train on, 360 to test on.

    The pixel values 0..16 become round(255 v / 16), a half rounded up. The split is stratified and
    fixed. Source: scikit-learn's `load_digits` (the test part of UCI's "Optical Recognition of
    Handwritten Digits").
    """

    name = "aqt_search_digits"
    VERSION = tfds.core.Version("1.0.0")
    # Where TFDS would look for a list of downloads, of which there are none; finding it out needs
    # the package importlib_resources, which TFDS does not install.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's digits as PNG images.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()  # a dict whose keys are attributes
        images = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
        train, test = train_test_split(
            np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0
        )
        return {
            split: self._generate_examples(images[indices], digits.target[indices])
            for split, indices in (("train", train), ("test", test))
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Encoded here, because TFDS encodes arrays with TensorFlow.
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, format="png")
            yield index, {"image": encoded.getvalue(), "label": int(label)}
