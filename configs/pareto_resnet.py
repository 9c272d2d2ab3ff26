"""The study of Pareto-ResNet (arXiv 2105.03536): widths of ResNets in bf16, int8 and int4.

The paper trains ResNet-29 to 200 on ImageNet for 250 epochs; this is its recipe, scaled in time:
SGD with Nesterov momentum 0.9, learning rate 0.1 * batch / 256, L2 1e-4, warm-up over 2 % of the
run, a cosine times a linear cooldown over the last 20 %, and a zero last BatchNorm scale in every
block. Weights have a scale per channel, activations an unsigned one per tensor.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.sweep \
        --config=configs/pareto_resnet.py --workdir=runs/pareto_resnet \
        --config.data.name=folder:/path/to/cifar10

runs ResNet-8 on CIFAR-10 at 16 x 16, what two CPU cores can do; `:imagenet` is the study at full
size (ResNet-29 and 50, 250 epochs), which has not been run here; `:quick` trains for one epoch.
The report says which fronts dominate, and shows the gap between training and test accuracy.

Test accuracy in % at widths 0.375, 0.75 and 1.5 (commit 9b5e133, one seed, 4 epochs): bf16 50.99,
56.71, 59.92; int8 51.11, 57.03, 60.43; int4 47.59, 53.51, 55.88; int4 with 8-bit ends 49.24, 54.90,
57.96. So bf16 is dominated, point by point, by int8 at a quarter of its cost; at equal accuracy the
front of int4 with 8-bit ends costs 0.12 times what bf16 costs, and 0.53 times what int8 costs.
Training less test accuracy: 7.0, 6.8, 5.8 and 7.0 points in the mean over the widths.
"""

import ml_collections

from configs import base

# The 8-bit ends of the paper: the first convolution and the classifier.
INT4_WITH_INT8_ENDS = (("stem|head", "int8"), (".*", "int4"))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base.get_config()
    if arg == "imagenet":
        _imagenet(config)
    else:
        _cifar10_16px(config)
        base.shorten(config, arg, epochs=1.0)
    config.optimizer.learning_rate = 0.1 * config.batch_size / 256
    config.optimizer.schedule = "cosine_linear_cooldown"
    config.optimizer.warmup_epochs = 0.02 * config.epochs
    config.optimizer.weight_decay = 1e-4
    config.evaluation.train_images = 10_000
    config.search.space = ((".*", ("int4", "int8", "bf16")),)  # no ends apart in the baselines
    config.sweep.baselines = ("bf16", "int8", "int4", ("int4-8bit-ends", INT4_WITH_INT8_ENDS))
    config.sweep.targets = ()
    config.sweep.side_by_side = True
    return config


def _cifar10_16px(config: ml_collections.ConfigDict) -> None:
    config.model.name = "resnet8"
    config.data.name = "folder:cifar10"
    config.data.image_size = 16
    config.data.flip = True
    config.batch_size = 128
    config.epochs = 4.0
    config.log_every = 20
    config.checkpoint_every = 500
    config.sweep.grid = (("model.width", (0.375, 0.75, 1.5)),)


def _imagenet(config: ml_collections.ConfigDict) -> None:
    config.model.form = "imagenet"
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.crop_fraction = 0.875
    config.data.crop_area = (0.08, 1.0)
    config.data.flip = True
    config.data.held_out = 10_000
    config.batch_size = 1024
    config.epochs = 250.0
    config.log_every = 100
    config.checkpoint_every = 5000
    config.sweep.grid = (
        ("model.name", ("resnet29", "resnet50")),
        ("model.width", (0.5, 0.75, 1.0, 1.5)),
    )
