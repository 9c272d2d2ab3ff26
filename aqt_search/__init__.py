"""aqt_search: mixed-precision formats for JAX models, searched in one training run.

    sites = find_sites(apply, params, x)                       # what there is to quantize
    assignment = assign(sites, [("head", "int8"), (".*", "int4")])
    logits = quantize(apply)(assignment, params, x)            # apply under these formats
    cost.gbops(sites, assignment)                              # what it costs
    frozen = freeze(apply, assignment, params, x)              # weights as they are stored
    logits = serve(apply)(frozen, x)

Packages are imported by name: `aqt_search.search` for searching formats while weights train,
`.ptq`, `.palette`, `.models`, `.data`, `.training` and `.report`.
"""

from aqt_search.architecture.channel_groups import ChannelGroup, channel_groups
from aqt_search.architecture.decisions import ArchitectureDecision, Times
from aqt_search.architecture.elastic import Elastic, elastic
from aqt_search.architecture.errors import ArchitectureError
from aqt_search.costs import cost, roofline
from aqt_search.numerics.calibration import (
    Bounds,
    Calibration,
    absmax,
    centred,
    delayed,
    fixed,
    frozen_after,
    mean_deviation,
    min_max,
    moving_average,
    mse,
    percentile,
    running_max,
)
from aqt_search.numerics.fake_quant import fake_quant, fake_quant_with_state, init_state
from aqt_search.numerics.formats import (
    FormatError,
    NumericFormat,
    numeric_format,
    round_to_format,
    stack_formats,
)
from aqt_search.numerics.gradient_rules import (
    PASS_THROUGH,
    STRAIGHT_THROUGH,
    GradientRule,
    ewgs,
)
from aqt_search.numerics.granularity import (
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    Granularity,
    per_block,
    per_channel,
)
from aqt_search.numerics.learned_scales import (
    Learned,
    batch_quant,
    lsq,
    merge_learned,
    pact,
    split_learned,
)
from aqt_search.numerics.qtensor import QTensor, quantize_tensor
from aqt_search.numerics.quantizer import Quantizer, quantizer
from aqt_search.products.ops import conv_general_dilated, dot_general, einsum, take
from aqt_search.tracing.assignment_file import AssignmentError, from_json, to_json
from aqt_search.tracing.freeze import Frozen, NotCalibrated, freeze
from aqt_search.tracing.layers import layer_sites
from aqt_search.tracing.measured_executions import measure_executions
from aqt_search.tracing.rules import RuleError, assign
from aqt_search.tracing.serve import serve
from aqt_search.tracing.sites import Operand, Site, SiteError, SiteFormats
from aqt_search.tracing.transform import (
    StatefulFunction,
    find_sites,
    quantize,
    quantize_with_state,
    with_keys,
    with_static_activations,
)
from aqt_search.weights.range_loss import range_loss

__version__ = "0.1.0"

__all__ = [
    "PASS_THROUGH",
    "PER_CHANNEL",
    "PER_TENSOR",
    "PER_TOKEN",
    "STRAIGHT_THROUGH",
    "ArchitectureDecision",
    "ArchitectureError",
    "AssignmentError",
    "Bounds",
    "Calibration",
    "ChannelGroup",
    "Elastic",
    "FormatError",
    "Frozen",
    "GradientRule",
    "Granularity",
    "Learned",
    "NotCalibrated",
    "NumericFormat",
    "Operand",
    "QTensor",
    "Quantizer",
    "RuleError",
    "Site",
    "SiteError",
    "SiteFormats",
    "StatefulFunction",
    "Times",
    "absmax",
    "assign",
    "batch_quant",
    "centred",
    "channel_groups",
    "conv_general_dilated",
    "cost",
    "delayed",
    "dot_general",
    "einsum",
    "elastic",
    "ewgs",
    "fake_quant",
    "fake_quant_with_state",
    "find_sites",
    "fixed",
    "freeze",
    "from_json",
    "frozen_after",
    "init_state",
    "layer_sites",
    "lsq",
    "mean_deviation",
    "measure_executions",
    "merge_learned",
    "min_max",
    "moving_average",
    "mse",
    "numeric_format",
    "pact",
    "per_block",
    "per_channel",
    "percentile",
    "quantize",
    "quantize_tensor",
    "quantize_with_state",
    "quantizer",
    "range_loss",
    "roofline",
    "round_to_format",
    "running_max",
    "serve",
    "split_learned",
    "stack_formats",
    "take",
    "to_json",
    "with_keys",
    "with_static_activations",
]
