"""CIFAR-10 averaged down to 16 x 16 with a tiny MobileNetV2: a depthwise net for two CPU cores.

Unpack the images (train/<class>/*.jpg, test/<class>/*.jpg) and name their folder:

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.sweep \
        --config=configs/cifar10_16px_mobilenet_v2.py --workdir=runs/cifar16_mobilenet \
        --config.data.name=folder:/path/to/cifar10

The flag makes two devices of two cores, which run two points side by side.

Test accuracy (commit f818d1c), mean and range of seeds 0 to 2: int4 67.22 % (66.90 .. 67.75) at
0.0160 GBOPs; search at 1.1 times its cost 70.96 % (70.74 .. 71.23) without retraining, its formats
trained from scratch 70.76 % (69.90 .. 71.42).
"""

import ml_collections

from configs import cifar10_16px_resnet8


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = cifar10_16px_resnet8.get_config(arg)
    if not arg:
        config.epochs = 12.0
        config.sweep.baselines = cifar10_16px_resnet8.INT
        config.sweep.spaces = (("int", {}),)
        config.sweep.sensitivity = "int4"
    config.model.name = "mobilenet_v2"
    config.model.form = "tiny"
    config.model.width = 0.5
    return config
