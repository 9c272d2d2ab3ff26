"""Two bits and less, on CIFAR-10 averaged down to 16 x 16: range losses, PTQ, QAT and palettes.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.sweep \
        --config=configs/cifar10_16px_low_bit.py --workdir=runs/low_bit16 \
        --config.data.name=folder:/path/to/cifar10

`:mobilenet_v2` is the depthwise network, `:quick` one seed of one epoch. Range losses act on the
float network alone; see configs/digits_low_bit.py for what follows.
"""

import ml_collections

from configs import cifar10_16px_mobilenet_v2, cifar10_16px_resnet8, digits_low_bit


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    if arg == "mobilenet_v2":
        config = cifar10_16px_mobilenet_v2.get_config()
        config.model.activation = "relu"  # scales cannot be moved through relu6
    else:
        config = cifar10_16px_resnet8.get_config(arg)
    config.sweep.baselines = digits_low_bit.float_networks()
    config.sweep.spaces = ()
    config.sweep.targets = ()
    config.sweep.retrain = False
    config.sweep.sensitivity = ""
    config.sweep.stages = digits_low_bit.STAGES
    return config
