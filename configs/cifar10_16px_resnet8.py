"""CIFAR-10 averaged down to 16 x 16 with a small ResNet-8: what two CPU cores can run in minutes.

Unpack the images (train/<class>/*.jpg, test/<class>/*.jpg) and name their folder:

    python -m experiments.sweep --config=configs/cifar10_16px_resnet8.py --workdir=runs/cifar16 \
        --config.data.name=folder:/path/to/cifar10
"""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model.depth = 8
    config.model.width = 0.75  # 12, 24 and 48 channels
    config.data.name = "folder:cifar10"
    config.data.image_size = 16
    config.data.flip = True
    config.batch_size = 128
    config.epochs = 8.0
    config.optimizer.learning_rate = 0.4
    config.optimizer.warmup_epochs = 0.5
    config.log_every = 20
    config.checkpoint_every = 500
    # 8-bit ends; a target of 1.08 leaves the other layers 1.1 times their cost in int4.
    config.search.space = (("stem|head", "int8"), (".*", ("int3", "int4", "int6", "int8")))
    config.search.target = 1.08
    config.sweep.baselines = ("int3", "int4", "int8")
    config.sweep.targets = (1.08,)
    config.sweep.seeds = (0, 1, 2)
    config.sweep.retrain = True
    base.shorten(config, arg, epochs=1.0)
    if arg == "quick":
        config.sweep.seeds = (0,)
    return config
