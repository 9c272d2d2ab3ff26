"""aqt_search: mixed-precision formats for JAX models, searched in one training run.

    sites = find_sites(apply, params, x)                       # what there is to quantize
    assignment = assign(sites, [("head", "int8"), (".*", "int4")])
    logits = quantize(apply)(assignment, params, x)            # apply under these formats
    cost.gbops(sites, assignment)                              # what it costs

The packages `aqt_search.search`, `.models`, `.data`, `.training`, `.report` are imported by name.
"""

from aqt_search import cost
from aqt_search.calibration import absmax_scale
from aqt_search.fake_quant import fake_quant
from aqt_search.formats import (
    FormatError,
    NumericFormat,
    numeric_format,
    round_to_format,
    stack_formats,
)
from aqt_search.ops import conv_general_dilated, dot_general, einsum
from aqt_search.qtensor import QTensor, quantize_tensor
from aqt_search.rules import RuleError, assign
from aqt_search.sites import Operand, Site, SiteError, SiteFormats
from aqt_search.transform import find_sites, quantize

__version__ = "0.1.0"

__all__ = [
    "FormatError",
    "NumericFormat",
    "Operand",
    "QTensor",
    "RuleError",
    "Site",
    "SiteError",
    "SiteFormats",
    "absmax_scale",
    "assign",
    "conv_general_dilated",
    "cost",
    "dot_general",
    "einsum",
    "fake_quant",
    "find_sites",
    "numeric_format",
    "quantize",
    "quantize_tensor",
    "round_to_format",
    "stack_formats",
]
