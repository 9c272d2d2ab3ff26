"""Images and labels: a data set by name, split, augmented, normalized and in batches.

TensorFlow Datasets, grain and scikit-learn are imported when they are first used.
"""

from aqt_search.data.augmentation import Augmentation
from aqt_search.data.errors import DataError
from aqt_search.data.normalization import channel_statistics
from aqt_search.data.pipeline import eval_batches, train_batches
from aqt_search.data.sources import ArraySource, ImageSource, RecordSource, Subset
from aqt_search.data.splits import Splits, open_splits
from aqt_search.data.stream import Batches, Readers

__all__ = [
    "ArraySource",
    "Augmentation",
    "Batches",
    "DataError",
    "ImageSource",
    "Readers",
    "RecordSource",
    "Splits",
    "Subset",
    "channel_statistics",
    "eval_batches",
    "open_splits",
    "train_batches",
]
