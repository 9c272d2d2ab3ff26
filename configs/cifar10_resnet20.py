"""CIFAR-10 at 32 x 32 with ResNet-20: for a GPU or TPU (an epoch takes minutes on two CPU cores).

Unpack the images (train/<class>/*.jpg, test/<class>/*.jpg) and name their folder:

    python -m experiments.sweep --config=configs/cifar10_resnet20.py --workdir=runs/cifar \
        --config.data.name=folder:/path/to/cifar10

`cifar10` prepared by TFDS as array_record does as well: --config.data.name=cifar10.

`:quick` runs a twentieth of an epoch of one baseline and one search, to see that it works. The full
form has not been run yet, so it states no result.
"""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model.name = "resnet20"
    config.data.name = "folder:cifar10"
    config.data.crop_padding = 4
    config.data.flip = True
    config.batch_size = 128
    config.epochs = 160.0
    config.optimizer.learning_rate = 0.2
    config.optimizer.warmup_epochs = 5.0
    config.log_every = 50
    config.checkpoint_every = 1000
    # FLIQS-L with 8-bit ends.
    config.search.space = (
        ("stem|head", "int8"),
        (".*", ("int4", "int5", "int6", "int7", "int8", "bf16")),
    )
    config.search.held_out_batch_size = 128
    config.sweep.baselines = ("float", "bf16", "int8", "int4")
    config.sweep.targets = (1.1, 1.5)
    config.sweep.retrain = True
    base.shorten(config, arg, epochs=0.05)
    if arg == "quick":
        config.sweep.baselines = ("int4",)
        config.sweep.targets = (1.1,)
    return config
