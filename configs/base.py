"""Every key of a configuration, with its default and meaning; the other files change some."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.model = ml_collections.ConfigDict()
    config.model.name = "resnet"
    config.model.depth = 8  # cifar form: 8, 20, 32, 56; imagenet form: 18, 34, 50, 101, 152
    config.model.form = "cifar"
    config.model.width = 1.0  # multiplies the channels
    config.model.dtype = "float32"  # of the computation; parameters are float32 always

    config.data = ml_collections.ConfigDict()
    config.data.name = "digits"  # "digits", "folder:/path/to/images", or a TFDS name
    config.data.data_dir = ""  # where prepared data is kept; "" is TFDS's own default
    config.data.image_size = 0  # images are averaged down to this size; 0 leaves them
    config.data.held_out = 0.1  # share (float) or number (int) of training images for the reward
    config.data.crop_padding = 0  # black pixels around an image before it is cropped at random
    config.data.flip = False  # mirror half of the training images

    config.batch_size = 64
    config.epochs = 10.0
    config.label_smoothing = 0.0

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "sgd"  # or "adamw"
    config.optimizer.learning_rate = 0.1  # the peak
    config.optimizer.schedule = "cosine"  # "constant", "cosine", "cosine_linear_cooldown", "step"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.gradient_clip = 0.0  # largest global norm; 0 for none

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.batch_size = 250
    # Training batches that give BatchNorm statistics and activation scales under the final formats;
    # with 0 the running statistics are used, and the scales of each evaluation batch.
    config.evaluation.calibration_batches = 50

    config.log_every = 10  # steps
    config.checkpoint_every = 200  # steps

    # experiments.train: ordered (pattern, formats) rules; none for the float model.
    config.formats = ()
    # experiments.train: a policy.json whose formats are trained from scratch, instead of rules.
    config.policy = ""

    config.search = ml_collections.ConfigDict()
    # Ordered rules: fixed formats, or a tuple of formats to choose from.
    config.search.space = ((".*", ("int4", "int8", "bf16")),)
    config.search.decide = "site"  # a decision for each site, or for each "rule"
    config.search.target = 1.1  # cost target ...
    config.search.relative_to = "int4"  # ... as a multiple of this format's cost; "" for GBOPs
    config.search.reward = "absolute"  # "absolute", "one_sided", "soft", "hard"
    config.search.beta = 1.0
    config.search.quality = "held_out"  # accuracy on held-out examples, or "train" on the batch
    config.search.held_out_batch_size = 32
    config.search.delay = 0.25  # share of the run before the policy moves
    config.search.learning_rate = 0.05
    config.search.baseline_momentum = 0.95
    config.search.entropy_weight = 0.1
    config.search.entropy_schedule = "cosine"  # "cosine", "linear", "constant", "step"
    config.search.temperature = 1.0
    config.search.log_probability = "sum"  # over decisions: "sum" or "mean"

    config.sweep = ml_collections.ConfigDict()
    # "float", or a format for every searched site; what the space fixes stays fixed.
    config.sweep.baselines = ("float", "int8", "int4")
    config.sweep.targets = (1.1,)  # one search each, relative to search.relative_to
    config.sweep.seeds = (0,)
    config.sweep.retrain = False  # also train each search's formats from scratch, to compare
    return config


def shorten(config: ml_collections.ConfigDict, arg: str, *, epochs: float) -> None:
    """Applies the argument behind a config's name: "quick" trains for `epochs` only."""
    if arg not in ("", "quick"):
        raise ValueError(
            f"Unknown form {arg!r} of the config: expected CONFIG.py or CONFIG.py:quick."
        )
    if arg == "quick":
        config.epochs = epochs
        config.optimizer.warmup_epochs = min(config.optimizer.warmup_epochs, epochs / 4)
        config.evaluation.calibration_batches = 10
