"""Quantized-for-all on CIFAR-10 at 16 x 16: a supernet of a tiny MobileNetV3 for two CPU cores.

The whole network in int8; the supernet that starts from it; its subnets, and the one for a target:

    C="--config=configs/cifar10_16px_qfa.py --config.data.name=folder:PATH"
    python -m experiments.train $C --workdir=runs/whole --config.formats="(('.*','int8'),)"
    python -m experiments.supernet $C --workdir=runs/supernet --config.checkpoint=runs/whole
    S="--workdir=runs/subnets --config.subnets.checkpoint=runs/supernet"
    python -m experiments.subnets $C $S
    python -m experiments.subnets $C $S --config.subnets.target=1.1

The space "small_mobilenet_v3": windows 3 and 5 and expansions 2, 4 and 6 of every block, one or two
blocks of each stage; integer formats of 3 to 8 bits of weights and of activations, with learned
steps of weights (LSQ) and BatchQuant of activations (arXiv 2105.08952). `:mobilenet_v2` has the
MobileNetV2 of configs/cifar10_16px_fliqnas.py in its place, whose filters are free, too.
"""

import ml_collections

from configs import cifar10_16px_fliqnas


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = cifar10_16px_fliqnas.get_config("quick" if arg == "quick" else "windows")
    if arg not in ("", "quick", "mobilenet_v2"):
        raise ValueError(
            f"Unknown form {arg!r} of the config: expected none, quick or mobilenet_v2."
        )
    if arg != "mobilenet_v2":
        config.model.name = "mobilenet_v3_tiny"
        config.model.windows = ()
        config.search.architecture = "small_mobilenet_v3"
    if arg != "quick":
        config.epochs = 6.0
    config.quantizers.weight = "lsq"
    config.quantizers.activation = "batch_quant"
    config.search.target, config.search.relative_to = 1.1, "int4"
    return config
