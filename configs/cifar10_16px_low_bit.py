"""Two bits and less, on CIFAR-10 averaged down to 16 x 16: range losses, PTQ, QAT and palettes.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.sweep \
        --config=configs/cifar10_16px_low_bit.py --workdir=runs/low_bit16 \
        --config.data.name=folder:/path/to/cifar10

`:mobilenet_v2` is the depthwise network, quantized after training alone; `:quick` one seed of one
epoch. Range losses act on the float network alone, as in configs/digits_low_bit.py; the first and
the last layer have 8 bits. Training through 2 bits goes on from the float weights, at half the
epochs and a quarter of the learning rate.
"""

import ml_collections

from configs import cifar10_16px_mobilenet_v2, cifar10_16px_resnet8, digits_low_bit

W8A8 = ((".*", "int8"),)


def low_bit(weight: str) -> tuple:
    """Weights in a format, everything else in 8 bits."""
    return (("stem|head", "int8"), (".*", {"weight": weight, "activation": "int8"}))


def after_training(weight: str, *steps: str) -> dict:
    """Post-training quantization with the best scale for the weights, then `steps`."""
    return {"formats": low_bit(weight), "quantizers.weight": "mse", "ptq.steps": steps}


QUANTIZED = (
    ("w8a8", "ptq", {"formats": W8A8}),
    ("w2a8_max", "ptq", {"formats": low_bit("int2")}),
    ("w2a8_mse", "ptq", after_training("int2")),
)
# A scale per tensor and, below, how to round have nothing to do with range losses.
STEPS = ("fold_batch_norm", "equalize", "correct_bias")
ONE_SCALE = {"formats": W8A8, "quantizers.weight_granularity": "tensor", "ptq.steps": STEPS}
W8A8_TENSOR = ("w8a8_tensor", "ptq", ONE_SCALE, ("plain",))


def _stages(epochs: float, learning_rate: float) -> tuple:
    through_2_bits = {
        "formats": low_bit("int2"), "range_loss.rules": (), "epochs": epochs / 2,
        "optimizer.learning_rate": learning_rate / 4, "optimizer.warmup_epochs": 0.0,
    }  # fmt: skip
    every = (
        *QUANTIZED,
        ("w2a8_adaround", "ptq", after_training("int2", *digits_low_bit.ROUNDED)),
        ("w2a8_qat", "train", through_2_bits),
        ("w2a8_lsq", "train", through_2_bits | {"quantizers.weight": "lsq"}),
        ("palette2", "palettize", {"palette.rules": ((".*", 2),)}),
        ("palette1", "palettize", {"palette.rules": ((".*", 1),)}),
    )
    rounded = tuple(
        (
            f"w{bits}a8_{how[0] if how else 'mse'}",
            "ptq",
            after_training(f"int{bits}", "fold_batch_norm", *how),
            ("plain",),
        )
        for bits in (4, 3)
        for how in ((), ("adaround",), ("gptq",))
    )
    return (*every, *rounded, W8A8_TENSOR)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    if arg == "mobilenet_v2":
        config = cifar10_16px_mobilenet_v2.get_config()
        config.model.activation = "relu"  # scales cannot be moved through relu6
        stages = (*QUANTIZED, W8A8_TENSOR)
    else:
        config = cifar10_16px_resnet8.get_config(arg)
        stages = _stages(config.epochs, config.optimizer.learning_rate)
    config.sweep.baselines = digits_low_bit.float_networks()
    config.sweep.spaces = ()
    config.sweep.targets = ()
    config.sweep.retrain = False
    config.sweep.sensitivity = ""
    config.sweep.stages = stages
    return config
