"""ImageNet (`imagenet2012`, prepared by TFDS as array_record) for the zoo: not run here.

    python -m experiments.sweep --config=configs/imagenet.py:resnet50 --workdir=runs/resnet50 \
        --config.data.data_dir=/path/to/tensorflow_datasets

Forms: resnet18, resnet50, mobilenet_v2, deit_s. Each sweeps FLIQS's uniform baselines and two
searches, at the costs of its tables (arXiv 2308.03290: about 1.15 and 1.5 times that of four bits),
with the network's usual recipe. The recipe of DeiT (arXiv 2012.12877) here has its optimizer,
schedule, label smoothing and stochastic depth, but not its mixing of images nor RandAugment.

What a run needs, estimated, as none has been run: ResNet-50 takes 3 x 4.1e9 multiply-accumulates
for an image (forward and backward), 24.6e9 FLOP; 90 epochs of 1.27 million images 2.8e18 FLOP. Of
an H200 (989e12 FLOP/s in bfloat16) at an assumed fifth of its peak that is 8,000 images/s, and 4
hours of one, half an hour of eight; the sweep is of seven runs. A core decodes 290 images/s (one
thread of a busy machine, images of 256 x 256 pixels, `python -m benchmarks.input_pipeline
--folder=CIFAR-10 --rounds=1 --seconds=4`), so that a chip would need 28 cores for itself; with
16 it trains in 7 hours. ImageNet's files are larger, 500 x 375 pixels: 1.6 times the time at the
same quality, and more where there is more in an image than in an enlarged one. Store them with 300
pixels on the short side, or take more hosts.
"""

import ml_collections

from configs import base


def get_config(arg: str = "resnet50") -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model.name = arg
    config.model.form = "imagenet"
    config.model.dtype = "bfloat16"
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.crop_fraction = 0.875
    config.data.crop_area = (0.08, 1.0)
    config.data.flip = True
    config.data.held_out = 10_000
    # One a core of a host with 16. In one process threads take turns at 0.1 ms of an image's 1.3
    # ms, so that more than about ten of them would wait for each other.
    config.data.workers = 16
    config.evaluation.batch_size = 1000
    config.log_every = 100
    config.checkpoint_every = 5000
    config.search.space = ((".*", "fliqs_l_int"),)
    config.search.held_out_batch_size = 512
    config.sweep.baselines = ("bf16", "int8", "int4")
    config.sweep.targets = (1.15, 1.5)
    config.sweep.retrain = True
    recipes = {
        "resnet18": _resnet, "resnet50": _resnet, "mobilenet_v2": _mobilenet_v2, "deit_s": _deit,
    }  # fmt: skip
    if arg not in recipes:
        raise ValueError(f"Unknown form {arg!r} of configs/imagenet.py: {', '.join(recipes)}.")
    recipes[arg](config)
    return config


def _resnet(config: ml_collections.ConfigDict) -> None:
    """Goyal et al. 2017 (arXiv 1706.02677), with a cosine."""
    config.batch_size = 1024
    config.epochs = 90.0
    config.label_smoothing = 0.1
    config.optimizer.learning_rate = 0.4
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 1e-4


def _mobilenet_v2(config: ml_collections.ConfigDict) -> None:
    """SGD with a cosine and light decay, as MobileNetV2 is commonly trained."""
    config.batch_size = 1024
    config.epochs = 180.0
    config.label_smoothing = 0.1
    config.optimizer.learning_rate = 0.4
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 4e-5


def _deit(config: ml_collections.ConfigDict) -> None:
    """DeiT (arXiv 2012.12877, table 9), without its augmentations."""
    config.batch_size = 1024
    config.epochs = 300.0
    config.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.gradient_clip = 1.0
