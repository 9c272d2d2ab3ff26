"""FLIQNAS on CIFAR-10 at 16 x 16: formats and architecture of a MobileNetV2, in one run on a CPU.

    python -m experiments.search --config=configs/cifar10_16px_fliqnas.py --workdir=runs/fliqnas \
        --config.data.name=folder:PATH
    python -m experiments.train --config=configs/cifar10_16px_fliqnas.py --workdir=runs/retrained \
        --config.data.name=folder:PATH --config.policy=runs/fliqnas/policy.json

The space "small_mobilenet_v2": windows 3 and 5 and expansions 2, 4 and 6 of every block, half to
all of the filters of every stage, one or two blocks of each; integer formats of 3 to 8 bits of
weights and of activations. The target is in GBOPs: int4 in the MobileNetV2 of width 0.5 with
windows of 3 costs 0.01599. `:float` offers float formats in place of the integers.

Test accuracy without retraining, mean and range of seeds 0 to 2, beside formats alone
(configs/cifar10_16px_mobilenet_v2.py with the same target and `--config.search.relative_to=`):

    GBOPs     formats and architecture    formats alone
    0.0104    67.04 (67.00 .. 67.06)      65.78 (65.23 .. 66.43)      commit b33ad6b
    0.0176    69.24 (68.96 .. 69.51)      70.96 (70.74 .. 71.23)      commit 2c006b2

int4 has 67.22 % at 0.0160. By the critic (`--config.search.searcher=critic`, commit 3631d83), seed
0 alone: 61.46 % at 0.0176, and its model 68.03 % from scratch.
"""

import ml_collections

from configs import cifar10_16px_mobilenet_v2

INT, FLOAT = ("int3", "int4", "int6", "int8"), ("e2m0", "e2m1", "e3m2", "e4m3")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = cifar10_16px_mobilenet_v2.get_config("quick" if arg == "quick" else "")
    if arg not in ("", "quick", "float"):
        raise ValueError(f"Unknown form {arg!r} of the config: expected none, quick or float.")
    config.model.windows = (5,)
    config.search.architecture = "small_mobilenet_v2"
    formats = FLOAT if arg == "float" else INT
    config.search.space = (
        ("stem|head", "int8"),
        (".*", {"weight": formats, "activation": formats}),
    )
    config.search.target, config.search.relative_to = 0.0176, ""
    return config
