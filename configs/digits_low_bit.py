"""Two bits and less, on scikit-learn's digits: range losses, then what is made of their weights.

    python -m experiments.sweep --config=configs/digits_low_bit.py --workdir=runs/low_bit
    python -m experiments.sweep --config=configs/digits_low_bit.py:quick --workdir=runs/quick

Each float network (without a range loss, and with each) is quantized after training in the ways of
`STAGES`, trained through 2-bit weights, and compressed to palettes. The report has all of it.
"""

from collections.abc import Mapping

import ml_collections

from configs import digits_resnet8

WEIGHTS = {"l_inf": 0.01, "margin": 0.01, "soft_min_max": 0.01}  # of the range losses
W2A8 = ((".*", {"weight": "int2", "activation": "int8"}),)
W8A8 = ((".*", "int8"),)
MSE = {"formats": W2A8, "quantizers.weight": "mse"}
ROUNDED = ("fold_batch_norm", "adaround", "correct_bias")

# (name, job, changes): see `sweep.stages` in configs/base.py.
STAGES = (
    ("w8a8", "ptq", {"formats": W8A8}),
    ("w2a8_max", "ptq", {"formats": W2A8}),
    ("w2a8_mse", "ptq", MSE),
    ("w2a8_adaround", "ptq", MSE | {"ptq.steps": ROUNDED}),
    ("w2a8_gptq", "ptq", MSE | {"ptq.steps": ("fold_batch_norm", "gptq", "correct_bias")}),
    ("w2a8_qat", "train", {"formats": W2A8, "range_loss.rules": ()}),
    (
        "w2a8_lsq",
        "train",
        {"formats": W2A8, "range_loss.rules": (), "quantizers.weight": "lsq"},
    ),
    ("palette2", "palettize", {"palette.rules": ((".*", 2),)}),
    ("palette1", "palettize", {"palette.rules": ((".*", 1),)}),
)


def float_networks(weights: Mapping[str, float] = WEIGHTS) -> tuple:
    """The networks that the stages start from: without a range loss, and with each."""

    def changes(name: str) -> dict:
        return {"range_loss.rules": ((".*", name),), "range_loss.weight": weights[name]}

    return (("plain", (), {}), *((name, (), changes(name)) for name in weights))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = digits_resnet8.get_config(arg)
    config.sweep.baselines = float_networks()
    config.sweep.targets = ()
    config.sweep.stages = STAGES
    if arg == "quick":
        config.sweep.baselines = float_networks({"margin": WEIGHTS["margin"]})
    return config
