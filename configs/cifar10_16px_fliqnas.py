"""FLIQNAS on CIFAR-10 at 16 x 16: formats and architecture of a MobileNetV2, in one run on a CPU.

    python -m experiments.search --config=configs/cifar10_16px_fliqnas.py --workdir=runs/fliqnas \
        --config.data.name=folder:PATH
    python -m experiments.train --config=configs/cifar10_16px_fliqnas.py --workdir=runs/retrained \
        --config.data.name=folder:PATH --config.policy=runs/fliqnas/policy.json

The space "small_mobilenet_v2_own_windows": expansions 2, 4 and 6 of every block, half to all of the
filters of every stage, one or two blocks of each; integer formats of 3 to 8 bits of weights and of
activations. The target is in GBOPs: int4 in the whole network costs 0.01599. `:windows` offers
windows of 5 beside 3 ("small_mobilenet_v2"), `:float` float formats in place of the integers.

Test accuracy without retraining, mean and range of seeds 0 to 2, beside formats alone
(configs/cifar10_16px_mobilenet_v2.py with the same target and `--config.search.relative_to=`):

    GBOPs     formats and architecture    windows, too (:windows)    formats alone
    0.0104    69.10 (68.76 .. 69.46)      67.04 (67.00 .. 67.06)     65.78 (65.23 .. 66.43)
    0.0176    71.05 (70.80 .. 71.29)      69.24 (68.96 .. 69.51)     70.96 (70.74 .. 71.23)

(Commits b33ad6b and 2c006b2; the first column by the rules of this space, before it had a name.)
int4 has 67.22 % at 0.0160. By the critic (`:windows --config.search.searcher=critic`, commit
3631d83), seed 0 alone: 61.46 % at 0.0176, and its model 68.03 % from scratch.
"""

import ml_collections

from configs import cifar10_16px_mobilenet_v2

INT, FLOAT = ("int3", "int4", "int6", "int8"), ("e2m0", "e2m1", "e3m2", "e4m3")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = cifar10_16px_mobilenet_v2.get_config("quick" if arg == "quick" else "")
    if arg not in ("", "quick", "float", "windows"):
        raise ValueError(
            f"Unknown form {arg!r} of the config: expected none, quick, float or windows."
        )
    config.search.architecture = "small_mobilenet_v2_own_windows"
    if arg == "windows":
        config.model.windows, config.search.architecture = (5,), "small_mobilenet_v2"
    formats = FLOAT if arg == "float" else INT
    config.search.space = (
        ("stem|head", "int8"),
        (".*", {"weight": formats, "activation": formats}),
    )
    config.search.target, config.search.relative_to = 0.0176, ""
    return config
