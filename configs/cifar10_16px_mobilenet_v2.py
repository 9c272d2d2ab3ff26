"""CIFAR-10 averaged down to 16 x 16 with a tiny MobileNetV2: a depthwise net for two CPU cores.

Unpack the images (train/<class>/*.jpg, test/<class>/*.jpg) and name their folder:

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.sweep \
        --config=configs/cifar10_16px_mobilenet_v2.py --workdir=runs/cifar16_mobilenet \
        --config.data.name=folder:/path/to/cifar10

The flag makes two devices of two cores, which run two points side by side.

Test accuracy (commit 82f9953), mean and range of seeds 0 to 2: int4 57.16 % (56.48 .. 57.76) at
0.0160 GBOPs, int8 62.58 % (62.02 .. 62.88) at 0.0611; search at 1.1 times int4's cost 57.33 %
(56.71 .. 57.82) without retraining, within 1.7 % of its target, and its formats trained from
scratch 59.10 % (57.82 .. 59.83).
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
