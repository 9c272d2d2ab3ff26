"""ResNet-8 on scikit-learn's digits (8 x 8 grey): a small job with no file to fetch.

    python -m experiments.sweep --config=configs/digits_resnet8.py --workdir=runs/digits
    python -m experiments.sweep --config=configs/digits_resnet8.py:quick --workdir=runs/quick

Saturated: int4, int8 and float are at 99 % of the 360 test images. configs/digits_mobilenet_v2.py
tells formats apart.
"""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model.name = "resnet8"
    config.model.width = 0.5
    config.data.name = "digits"
    config.data.crop_padding = 1
    config.batch_size = 64
    config.epochs = 50.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_epochs = 1.0
    config.search.space = (("stem|head", "int8"), (".*", ("int3", "int4", "int6", "int8")))
    config.search.learning_rate = 0.1
    config.sweep.baselines = ("float", "int8", "int4", "int3")
    config.sweep.targets = (0.75, 1.1, 1.6)
    base.shorten(config, arg, epochs=8.0)
    return config
