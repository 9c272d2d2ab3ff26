"""CIFAR-10 at 32 x 32 with MobileNetV2: for a GPU or TPU.

    python -m experiments.sweep --config=configs/cifar10_mobilenet_v2.py --workdir=runs/mobilenet \
        --config.data.name=folder:/path/to/cifar10

`:quick` runs a twentieth of an epoch of one baseline and one search, to see that it works. The full
form has not been run yet, so it states no result.
"""

import ml_collections

from configs import cifar10_resnet20


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = cifar10_resnet20.get_config(arg)
    config.model.name = "mobilenet_v2"
    config.model.width = 0.5 if arg == "quick" else 1.0
    config.optimizer.learning_rate = 0.1
    return config
