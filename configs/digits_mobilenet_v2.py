"""A tiny MobileNetV2 on scikit-learn's digits (8 x 8 grey): what a search gains, in minutes.

    python -m experiments.sweep --config=configs/digits_mobilenet_v2.py --workdir=runs/digits
    python -m experiments.sweep --config=configs/digits_mobilenet_v2.py:quick --workdir=runs/quick

`make search` is the first of the two, on two devices of the CPU. Depthwise layers tell formats
apart where a ResNet on the digits does not. Three seeds test on a third of the 1,797 images each,
so that every image is tested on once. docs/results.md has the table.
"""

import ml_collections

from configs import base

FORMATS = ("int3", "int4", "int5", "int6", "int7", "int8")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model.name = "mobilenet_v2"
    config.model.form = "tiny"
    config.model.width = 0.5
    config.data.name = "digits"
    config.data.folds = 3
    config.data.crop_padding = 1
    config.batch_size = 64
    config.epochs = 16.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_epochs = 1.0
    config.evaluation.calibration_batches = 10
    config.search.space = (
        ("stem|head", "int8"),
        (".*", {"weight": FORMATS, "activation": FORMATS}),
    )
    config.sweep.seeds = (0, 1, 2)
    config.sweep.baselines = FORMATS
    config.sweep.targets = (0.8, 1.1, 1.5, 2.2)
    config.sweep.side_by_side = True
    base.shorten(config, arg, epochs=4.0)
    return config
