"""DoReFa-Net's weights against the paper's formulas in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.calibration import centred, fixed
from aqt_search.numerics.gradient_rules import PASS_THROUGH
from aqt_search.numerics.quantizer import Quantizer
from aqt_search.weights.dorefa import companded, companded_model


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(4, name="body")(x)))


def paper(weights, bits):
    """2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, equations 5 and 9."""
    squashed = np.tanh(np.asarray(weights, np.float64))
    unit = squashed / (2 * np.abs(squashed).max()) + 0.5
    levels = 2**bits - 1
    return 2 * np.round(unit * levels) / levels - 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_are_the_papers_and_are_served_so(bits):
    model, x = Net(), np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    variables = model.init(jax.random.key(1), x)
    sites = aqs.find_sites(model.apply, variables, x)
    dorefa = companded_model(model, sites, ["body/kernel"])
    weight = Quantizer(f"uint{bits}", aqs.PER_TENSOR, centred(fixed(1.0)), gradient=PASS_THROUGH)
    assignment = {"body/kernel": aqs.SiteFormats(rhs=weight)}
    params = jax.tree.map(lambda leaf: leaf, variables)
    params["params"]["body"]["kernel"] = jnp.asarray(
        paper(variables["params"]["body"]["kernel"], bits), jnp.float32
    )
    expected = model.apply(params, x)
    found = aqs.quantize(dorefa.apply)(assignment, variables, x)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    frozen = aqs.freeze(dorefa.apply, assignment, variables, x)
    np.testing.assert_allclose(aqs.serve(dorefa.apply)(frozen, x), expected, rtol=2e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_companded_weights():
    weights = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    q = Quantizer("uint2", calibration=centred(fixed(1.0)), gradient=PASS_THROUGH)
    factor = np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32)
    through = jax.grad(lambda w: jnp.sum(factor * aqs.fake_quant(companded(w), q)))(weights)
    np.testing.assert_allclose(
        through, jax.grad(lambda w: jnp.sum(factor * companded(w)))(weights), rtol=1e-6
    )


def test_zero_weights_stay_zero_and_unknown_sites_are_errors():
    np.testing.assert_array_equal(companded(jnp.zeros(3)), np.zeros(3))
    model, x = Net(), np.zeros((1, 6), np.float32)
    sites = aqs.find_sites(model.apply, model.init(jax.random.key(0), x), x)
    with pytest.raises(aqs.SiteError, match="nowhere"):
        companded_model(model, sites, ["nowhere"])
