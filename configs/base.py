"""Every key of a configuration, with its default and meaning; the other files change some."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.series = ""  # the front that a point belongs to, in the report

    config.model = ml_collections.ConfigDict()
    config.model.name = "resnet8"  # aqt_search.models.MODELS lists them
    config.model.form = "cifar"  # for small images; "imagenet" for large ones
    config.model.width = 1.0  # multiplies the channels
    # MobileNetV2 and V3; () as published. Windows and expansions of every block, or (n,) for all;
    # depths: blocks of every stage.
    config.model.windows = ()
    config.model.expansions = ()
    config.model.depths = ()
    config.model.activation = ""  # "" for the network's own; MobileNetV1 and V2: "relu6", "relu"
    config.model.dtype = "float32"  # of the computation; parameters are float32 always

    config.data = ml_collections.ConfigDict()
    config.data.name = "digits"  # "digits", "folder:/path/to/images", or a TFDS name
    config.data.data_dir = ""  # where prepared data is kept; "" is TFDS's own default
    config.data.image_size = 0  # images are averaged down to this size; 0 leaves them
    config.data.held_out = 0.1  # share (float) or number (int) of training images for the reward
    # Above 0, train and test are joined and cut into so many parts, of which the seed's is the test
    # split: with as many seeds every image of a small data set is tested on once.
    config.data.folds = 0
    # ImageNet's reading: cut out the centre at evaluation (this share of the short side; 0 scales
    # the whole image), and a random part in training (shares of the area: (0.08, 1.0); () none).
    config.data.crop_fraction = 0.0
    config.data.crop_area = ()
    config.data.crop_padding = 0  # black pixels around an image before it is cropped at random
    config.data.flip = False  # mirror half of the training images
    # Who makes the batches of images that are not held in memory, decoded; their bits, and where a
    # run goes on, do not depend on it (docs/hosts.md; benchmarks/input_pipeline.py: what pays).
    # Processes for each stream of batches, which share every batch; 0: threads of this one.
    config.data.workers = 0
    config.data.threads = 0  # that make batches, in each worker or here; 0: what suits the images
    config.data.prefetch = 0  # batches made ahead; 0: two a thread, and two with workers

    config.batch_size = 64
    config.epochs = 10.0
    config.label_smoothing = 0.0
    # What products keep for the backward pass: "codes" take a quarter of the memory of "values".
    config.residuals = "codes"

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "sgd"  # or "adamw"
    config.optimizer.learning_rate = 0.1  # the peak
    config.optimizer.schedule = "cosine"  # "constant", "cosine", "cosine_linear_cooldown", "step"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.gradient_clip = 0.0  # largest global norm; 0 for none

    # Ordered (pattern, loss) rules: "l_inf", "margin", "soft_min_max", "kurtosis", or None. The
    # range loss of the weights is added to the loss, times `weight` (weights/range_loss.py).
    config.range_loss = ml_collections.ConfigDict()
    config.range_loss.rules = ()
    config.range_loss.weight = 0.01

    # How tensors are put into their formats: experiments.quantizers. Calibrations: "absmax", "mse",
    # "percentile(99.9)", "lsq", "pact", "batch_quant", "centred(mse)", ...; gradients:
    # "straight_through" (0 where clipped), "pass_through", "ewgs(0.001)".
    config.quantizers = ml_collections.ConfigDict()
    config.quantizers.weight = "absmax"
    config.quantizers.activation = "absmax"
    config.quantizers.weight_gradient = "straight_through"
    config.quantizers.activation_gradient = "straight_through"
    # A scale per output "channel", one for the "tensor", or one per block along the contraction.
    config.quantizers.weight_granularity = "channel"  # or "tensor", "block(32)"
    # One scale for the "tensor", or one per "token": each row that a product leaves, or each image
    # of a convolution. It is of that row alone in training and evaluation, and never static.
    config.quantizers.activation_granularity = "tensor"
    # Patterns of sites whose weights are companded by tanh: with "centred(fixed(1.0))" and
    # "pass_through" these are DoReFa-Net's (aqt_search.weights.dorefa).
    config.quantizers.companded = ()

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.batch_size = 250
    # Training batches that give BatchNorm statistics and activation scales under the final formats;
    # with 0 the running statistics are used, and the scales of each evaluation batch.
    config.evaluation.calibration_batches = 50

    # Training images, not augmented, that are evaluated too: for the generalization gap.
    config.evaluation.train_images = 0

    config.log_every = 10  # steps
    config.checkpoint_every = 200  # steps

    # experiments.train: ordered (pattern, formats) rules; none for the float model.
    config.formats = ()
    # The workdir of a finished run of the same model, data and seed. experiments.train starts from
    # its weights (learned scales start anew), experiments.ptq quantizes them.
    config.checkpoint = ""
    # experiments.train: a policy.json whose formats are trained from scratch, instead of rules.
    config.policy = ""

    # experiments.ptq: what is done to the weights, in order (experiments.ptq_steps):
    # "fold_batch_norm", "equalize", "smooth", "reestimate_batch_norm", "adaround" or "gptq",
    # "correct_bias". The formats are `formats`, their scales `quantizers`.
    config.ptq = ml_collections.ConfigDict()
    config.ptq.steps = ()
    config.ptq.images = 1000  # training images for calibration, not augmented
    config.ptq.batch_size = 250
    config.ptq.adaround_steps = 1000
    config.ptq.smoothing = 0.5  # strength of "smooth"
    # Bounds from BatchNorm's statistics alone; `other_bounds`, pairs (site, max|x|), tells of
    # the rest, such as the images.
    config.ptq.data_free = False
    config.ptq.other_bounds = ()

    config.sensitivity = ml_collections.ConfigDict()
    config.sensitivity.checkpoint = ""  # the workdir of a finished run, whose weights are judged
    config.sensitivity.formats = ("int2", "int3", "int4", "int8")
    config.sensitivity.reference = "float"  # or the format of all other layers
    config.sensitivity.images = 1000  # held-out images
    config.sensitivity.split = "reward"  # or "train"; never the test split
    config.sensitivity.chunk = 16  # assignments in one call

    # experiments.compare_searchers: other searchers on the weights of a finished search.
    config.searchers = ml_collections.ConfigDict()
    config.searchers.checkpoint = ""  # the workdir of the search
    # All but "brute_force", for small spaces.
    config.searchers.names = (
        "random", "greedy", "evolution", "critic", "policy_gradient", "scores",
    )  # fmt: skip
    config.searchers.evaluations = 100  # points that each may judge
    config.searchers.images = 1000  # held-out images: half to judge, half to report

    # experiments.allocate: formats from `search.space` for the trained network of `checkpoint`, at
    # each target (as `search.target`), and uniform ones; quantized as `ptq` and `quantizers` say.
    config.allocate = ml_collections.ConfigDict()
    config.allocate.targets = (0.8, 1.1, 1.5, 2.2)
    config.allocate.uniform = ("int4", "int8")
    # What an option is worth: "scores" by gradients (search.scores), "one_at_a_time" by a forward
    # pass for each; both on `search.score_images` training images.
    config.allocate.by = "scores"

    config.search = ml_collections.ConfigDict()
    # Ordered rules: fixed formats; a tuple of formats to choose from, or the name of such a tuple
    # ("fliqs_s_int", "fliqs_l_fp", ...: aqt_search.search.options); or a mapping of "weight" and
    # "activation" to either, which are then decided apart.
    config.search.space = ((".*", ("int4", "int8", "bf16")),)
    config.search.decide = "site"  # what shares a decision: site, block, rule, model, stack
    # Of MobileNetV2 and V3 the architecture, too, by the name of a space ("fliqnas_mobilenet_v2",
    # "small_mobilenet_v2", ...: aqt_search.architecture.named_spaces), or by rules such as
    # ("width", "^last/", (64, 128)): experiments.architecture. config.model is the largest network.
    config.search.architecture = ""
    config.search.architecture_rules = ()
    # Of searchers that sample: the share of the run in which samples are the largest network with a
    # probability that falls to 0, and the kinds of decisions for which that holds (widths and
    # expansions: TuNAS's filter warm-up).
    config.search.warm_up = 0.25
    config.search.warm_up_kinds = ("width", "expansion", "window", "depth")
    # "scores" judges all options by gradients, once, at the end of the delay (search.scores; those
    # of the architecture by a forward pass for each, on eight times the images), "one_at_a_time" by
    # a forward pass for each; "critic" (aqt_search.search.critic),
    # "policy_gradient" (FLIQS: beta, advantage, and what stands from cost_samples on, but for the
    # delay, are its own) and "random", to compare with, judge sampled points all along: by reward,
    # quality, measure and samples.
    config.search.searcher = "scores"
    config.search.score_images = 512  # training images, not augmented, that these judge by
    config.search.cost = "gbops"  # "weight_bytes", or "latency_ms/h100" (aqt_search.costs.roofline)
    config.search.target = 1.1  # cost target ...
    config.search.relative_to = "int4"  # ... as a multiple of this format's cost; "" for units
    config.search.further_costs = ()  # with targets of their own: (cost, target, relative_to), ...
    # The answer is the most probable point whose cost is this near its target; with 0 the most
    # probable one, wherever it is. Decided once, it is the best that costs at most its target.
    config.search.tolerance = 0.02
    config.search.reward = "absolute"  # "absolute", "one_sided", "soft", "hard"
    config.search.beta = 1.0
    config.search.quality = "held_out"  # on held-out examples, or "train" on the training batch
    # "loss" or "accuracy". On 32 images the formats explain 9 % of the differences in loss between
    # two points, and 1 % of those in accuracy (ResNet-8, CIFAR-10 at 16 x 16, half-trained).
    config.search.measure = "loss"
    config.search.held_out_batch_size = 32
    config.search.samples = 2  # points judged in a step
    config.search.advantage = "centred"  # over the samples of a step, or a moving "baseline"
    config.search.cost_samples = 256  # points whose cost alone is judged; 0: those of `samples`
    config.search.penalty = "annealed"  # from that of the expected cost to the expected; "sampled"
    # Share of the run before the policy moves, or before it is decided once: until then it trains
    # under the options of most bits.
    config.search.delay = 0.25
    config.search.learning_rate = 0.05
    config.search.baseline_momentum = 0.95
    config.search.entropy_weight = 0.1
    config.search.entropy_schedule = "cosine"  # "cosine", "linear", "constant", "step"
    config.search.temperature = 1.0
    config.search.log_probability = "sum"  # over decisions: "sum" or "mean"

    # experiments.supernet: weights whose subnets (search.architecture) all work, in all formats.
    config.supernet = ml_collections.ConfigDict()
    config.supernet.subnets = 2  # random ones in a step, beside the largest and the smallest
    config.supernet.distillation = 1.0  # weight of the largest subnet's logits
    config.supernet.kernel_matrices = True  # smaller windows are learned functions of larger ones
    # (share of the run, kinds of decisions that random subnets are free in), one after another:
    # "width", "expansion", "window", "depth", "formats"; then all are free.
    config.supernet.phases = ()

    # experiments.subnets: subnets of the supernet in the folder `checkpoint`.
    config.subnets = ml_collections.ConfigDict()
    config.subnets.checkpoint = ""
    config.subnets.samples = 300  # random subnets that are judged, and the predictor learns from
    config.subnets.images = 1000  # held-out images that they are judged on
    config.subnets.evaluations = 20000  # points that NSGA-II asks the predictor for
    config.subnets.points = 6  # of the front found, evaluated exactly as models of their own
    config.subnets.target = (
        0.0  # of search.cost, as search.relative_to says: this alone; 0: a front
    )

    config.sweep = ml_collections.ConfigDict()
    # Points are run for each seed, and for each combination of `grid`: (key, values), ...
    config.sweep.seeds = (0,)
    config.sweep.grid = ()  # such as (("model.width", (0.5, 1.0)), ("model.name", ("resnet8",)))
    # "float", a format for every searched site (what the space fixes stays fixed), or
    # (name, rules) with rules as in `formats`, or (name, rules, changes of keys).
    config.sweep.baselines = ("float", "int8", "int4")
    config.sweep.targets = (1.1,)  # one search each, relative to search.relative_to
    # The targets are searched in each of these spaces, (name, changes of keys), ...; none: as
    # `search` says. Such as ("fp", {"search.space": ..., "search.relative_to": "e2m1"}).
    config.sweep.spaces = ()
    config.sweep.retrain = False  # also train each search's formats from scratch, to compare
    # What is done to the weights of every baseline afterwards, each a point of its own: (name, job,
    # changes of keys), job "train", "ptq" or "palettize"; or (name, job, changes, baselines), to go
    # on from these alone.
    config.sweep.stages = ()
    # A baseline, on whose weights the sensitivity of every layer is measured; "" for none.
    config.sweep.sensitivity = ""
    # Runs points that share a program side by side, one on each device, instead of each over all.
    config.sweep.side_by_side = False
    # "local", or "ray": every point, or those that run side by side, are a task of a Ray cluster
    # whose nodes all see the workdir. What a task asks for: "CPU", "GPU", "memory" (bytes), and by
    # its name what else nodes have, such as (("CPU", 8), ("GPU", 1)) or (("TPU", 4),).
    config.sweep.engine = "local"
    config.sweep.resources = (("CPU", 1),)
    # HOST:PORT; "auto" for the cluster of this machine, "local" for one that the sweep starts here.
    # The environment's RAY_ADDRESS counts first.
    config.sweep.ray_address = "auto"
    config.sweep.ray_retries = 10  # of a task whose process or node is lost

    # experiments.palettize: the weights of `checkpoint` as indices of tables. Ordered (pattern,
    # palette) rules: bits of an index, {"bits": ..., "dimension": weights that share an index}, or
    # None for weights that stay as they are.
    config.palette = ml_collections.ConfigDict()
    config.palette.rules = ((".*", 2),)
    config.palette.restarts = 3  # of k-means, of which the best is kept
    config.palette.epochs = 0.0  # of training through soft palettes (DKM); 0: k-means alone
    config.palette.learning_rate = 0.01  # the peak in that training; the rest is `optimizer`'s
    config.palette.temperature = 0.05  # of the soft palettes, in mean squares of a layer's weights
    config.palette.iterations = 3  # of their centroids in a step
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
