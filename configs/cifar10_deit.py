"""CIFAR-10 at 32 x 32 with a DeiT-Ti of 4 x 4 patches: for a GPU or TPU.

    python -m experiments.sweep --config=configs/cifar10_deit.py --workdir=runs/deit \
        --config.data.name=folder:/path/to/cifar10

`:quick` runs a twentieth of an epoch of one baseline and one search with the tiny form, to see that
it works. The full form has not been run yet, so it states no result.
"""

import ml_collections

from configs import cifar10_resnet20


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = cifar10_resnet20.get_config(arg)
    config.model.name = "deit_tiny" if arg == "quick" else "deit_ti"
    config.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.gradient_clip = 1.0
    return config
