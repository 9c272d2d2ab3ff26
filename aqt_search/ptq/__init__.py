"""Post-training quantization: small steps over a model function, its variables and data.

    assignment = assign(find_sites(apply, variables, batches[0]), rules)
    assignment, state = calibrate(apply, assignment, variables, batches)      # every bound is fixed
    variables = adaround(apply, assignment, state, variables, batches)        # weights on the grid
    logits = quantize_with_state(apply).evaluate(assignment, state, variables, x)
    frozen = freeze(apply, assignment, variables, x, state=state)

`apply(variables, batch)` is any JAX function whose first argument holds all that is not data. No
step changes it: what a step returns are variables of the same tree. A site that a step cannot serve
stays as it is, under the warning `SkippedSite`; input that it cannot work with is a `PTQError`.
"""

from aqt_search.ptq.adaround import adaround
from aqt_search.ptq.batch_norm_folding import fold_batch_norm
from aqt_search.ptq.bias_correction import correct_bias
from aqt_search.ptq.captures import SiteValues, site_values
from aqt_search.ptq.channel_moments import NormalStatistics, batch_norm_statistics
from aqt_search.ptq.data_free import calibrate_data_free, correct_bias_data_free
from aqt_search.ptq.dataflow import SiteFlow, dataflow
from aqt_search.ptq.equalization import equalization_scales, equalize
from aqt_search.ptq.errors import PTQError, SkippedSite
from aqt_search.ptq.gptq import gptq
from aqt_search.ptq.smoothing import smooth
from aqt_search.ptq.static_bounds import calibrate, static_assignment

__all__ = [
    "NormalStatistics",
    "PTQError",
    "SiteFlow",
    "SiteValues",
    "SkippedSite",
    "adaround",
    "batch_norm_statistics",
    "calibrate",
    "calibrate_data_free",
    "correct_bias",
    "correct_bias_data_free",
    "dataflow",
    "equalization_scales",
    "equalize",
    "fold_batch_norm",
    "gptq",
    "site_values",
    "smooth",
    "static_assignment",
]
