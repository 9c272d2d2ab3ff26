"""Multiply-accumulates and numbers of points of published architecture spaces, exactly.

Everything is traced with abstract values: nothing of the networks' size is computed.
"""

import functools
import itertools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.architecture.named_spaces import architecture
from aqt_search.architecture.subnet_sites import subnet_sites
from aqt_search.models import build
from aqt_search.models.convolution import convolution
from aqt_search.models.fitting import fitted
from aqt_search.models.mobilenet_v3 import Block, InvertedResidual
from aqt_search.search.space import make_space


def images(size):
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


# --- Once-for-all's MobileNetV3 (arXiv 1908.09791) ------------------------------------------------


@functools.cache
def largest(width):
    model = build("mobilenet_v3_ofa", 1000, width=width)
    return model, jax.eval_shape(model.init, jax.random.key(0), images(224))


@functools.cache
def once_for_all(width, size):
    model, variables = largest(width)
    choices = architecture("ofa_mobilenet_v3", model)
    return aqs.elastic(model.apply, variables, images(size), **choices)


class Subnet(NamedTuple):
    """One with the same window and expansion in all blocks, and the same depth in all stages."""

    window: int
    expansion: int
    depth: int
    size: int

    @property
    def built_with(self):
        """What the zoo's builder is told: the first block has a stage of its own, and no choice."""
        later = 5 * self.depth
        return {
            "windows": (3, *[self.window] * later), "expansions": (1, *[self.expansion] * later),
            "depths": (1, *[self.depth] * 5),
        }  # fmt: skip

    def choices(self, net):
        """The point of an elastic network: widths are options in the order of expansions."""
        option = {
            "width": (3, 4, 6).index(self.expansion), "window": (3, 5, 7).index(self.window),
            "depth": (2, 3, 4).index(self.depth),
        }  # fmt: skip
        return np.array([option[decision.kind] for decision in net.decisions])


# Of all layers with weights, the classifier of 1000 classes among them: a sum over the published
# space that was written out apart from this library.
ONCE_FOR_ALL = {
    (1.0, Subnet(7, 6, 4, 224)): 566_170_656,
    (1.0, Subnet(3, 3, 2, 224)): 121_278_672,
    (1.0, Subnet(3, 3, 2, 128)): 41_476_224,
    (1.0, Subnet(5, 4, 3, 192)): 185_097_984,
    (1.2, Subnet(7, 6, 4, 224)): 843_101_040,
    (1.2, Subnet(3, 3, 2, 224)): 193_078_200,
    (1.2, Subnet(3, 3, 2, 128)): 65_536_896,
    (1.2, Subnet(5, 4, 3, 192)): 284_524_160,
}


def macs(sites, assignment):
    return aqs.cost.total_macs(sites)


@functools.cache
def tabulated_macs(width, size):
    net = once_for_all(width, size)
    return make_space(net.sites, [(".*", "int8")], net=net).cost_table(macs)


@pytest.mark.parametrize("width, subnet", ONCE_FOR_ALL)
def test_elastic_once_for_all_has_its_macs(width, subnet):
    net, expected = once_for_all(width, subnet.size), ONCE_FOR_ALL[width, subnet]
    choices = subnet.choices(net)
    assert aqs.cost.total_macs(subnet_sites(net, choices)) == expected
    table = tabulated_macs(width, subnet.size)
    np.testing.assert_allclose(table.of_many(choices[None])[0], expected, rtol=1e-13)
    np.testing.assert_allclose(table.of(choices), expected, rtol=1e-6)


@pytest.mark.parametrize("width, subnet", ONCE_FOR_ALL)
def test_plain_once_for_all_has_its_macs(width, subnet):
    """The zoo's model, traced with the variables that are cut out of the largest: Flax compares
    their shapes."""
    net = once_for_all(width, subnet.size)
    model, variables = largest(width)
    cut = jax.eval_shape(functools.partial(net.extract, subnet.choices(net)), variables)
    extracted, cut = fitted(model, cut)
    plain = build("mobilenet_v3_ofa", 1000, width=width, **subnet.built_with)
    sizes = [
        [(b.window, b.expanded, b.channels, b.stride) for b in each.blocks]
        for each in (extracted, plain)
    ]
    assert sizes[0] == sizes[1]
    sites = aqs.find_sites(plain.apply, cut, images(subnet.size))
    assert aqs.cost.total_macs(sites) == ONCE_FOR_ALL[width, subnet]


# --- Quantized-for-all: formats beside it (arXiv 2105.08952) --------------------------------------

THREE_EACH = {role: ("int2", "int3", "int4") for role in ("weight", "activation")}
FORMATS = {
    "once for all": [(".*", "int8")],
    "quantized for all": [
        (r"^block1/|stem|squeeze|excite|last|hidden|head", "int8"), (".*", THREE_EACH),
    ],
}  # fmt: skip


def number_of_points(space):
    """Subnets with different formats: under each choice of the depths, the options of what a subnet
    has."""
    kinds = [getattr(decision, "kind", "format") for decision in space.decisions]
    options = [len(decision.options) for decision in space.decisions]
    depths = [number for number, kind in enumerate(kinds) if kind == "depth"]
    points = np.zeros((math.prod(options[d] for d in depths), len(options)), int)
    points[:, depths] = list(itertools.product(*(range(options[d]) for d in depths)))
    decides = np.array(jax.vmap(space.active)(jnp.asarray(points)))
    decides[:, depths] = False
    return sum(math.prod(itertools.compress(options, of_point)) for of_point in decides)


@pytest.mark.parametrize("name, of_block, text", [
    ("once for all", 3 * 3, "2.1759e+19"),
    ("quantized for all", 3 * 3 * 3**6, "2.1864e+76"),  # windows, expansions, three layers' formats
])  # fmt: skip
def test_spaces_have_their_numbers_of_points(name, of_block, text):
    net = once_for_all(1.2, 224)
    points = number_of_points(make_space(net.sites, FORMATS[name], net=net))
    assert points == sum(of_block**depth for depth in (2, 3, 4)) ** 5
    assert f"{points:.5g}" == text


# --- AttentiveNAS (arXiv 2011.09011) --------------------------------------------------------------

SQUEEZED = (False, False, True, False, True, True, True)
STRIDES = (1, 2, 2, 2, 1, 2, 1)


class AttentiveNas(nn.Module):
    """Inverted residual blocks that all add their input: its means over 2 x 2 pixels where they
    have stride 2, through a 1 x 1 convolution where the channels change.

    Without BatchNorm, and with the zoo's activations: no site is about either.
    """

    widths: tuple[int, ...]  # of stem, stages and the layer before the classifier
    windows: tuple[int, ...]
    expansions: tuple[int, ...]
    depths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(convolution, dtype=jnp.float32)
        stem, *channels, last = self.widths
        x = conv(stem, 3, 2, name="stem")(x)
        stages = zip(channels, self.windows, self.expansions, self.depths, SQUEEZED, STRIDES)
        for stage, (features, window, expansion, depth, squeezed, stride) in enumerate(stages, 1):
            for number in range(depth):
                if number == 0 and stride == 2:
                    shortcut = nn.avg_pool(x, (2, 2), (2, 2))
                else:
                    shortcut = x
                if x.shape[-1] != features:
                    shortcut = conv(features, 1, name=f"shortcut{stage}")(shortcut)
                block = Block(
                    window, expansion * x.shape[-1], features, squeezed, True,
                    stride if number == 0 else 1, adds=False,
                )  # fmt: skip
                name = f"block{stage}_{number}"
                x = shortcut + InvertedResidual(block, jnp.float32, unnormalised, name=name)(x)
        x = nn.hard_swish(conv(6 * features, 1, name="last")(x))
        x = nn.hard_swish(nn.Dense(last, use_bias=False, name="hidden")(jnp.mean(x, (1, 2))))
        return nn.Dense(1000, name="head")(x)


def unnormalised(name):
    return lambda x: x


# Widths, windows, expansions and depths by stage, resolution and multiply-accumulates. Published
# are the networks and, as millions, the last column: 203, 279, 317, 357, 444, 491 and 709.
ATTENTIVE_NAS = {
    "a0": ((16, 16, 24, 32, 64, 112, 192, 216, 1792), (3, 3, 3, 3, 3, 3, 3), (1, 4, 4, 4, 4, 6, 6),
           (1, 3, 3, 3, 3, 3, 1), 192, 203_389_568),
    "a1": ((16, 16, 24, 32, 64, 112, 192, 216, 1984), (3, 3, 3, 5, 3, 5, 3), (1, 4, 4, 4, 4, 6, 6),
           (1, 3, 3, 3, 3, 3, 1), 224, 279_238_816),
    "a2": ((16, 16, 24, 32, 64, 112, 200, 224, 1984), (3, 3, 3, 3, 3, 5, 3), (1, 4, 5, 4, 4, 6, 6),
           (1, 3, 3, 3, 3, 4, 1), 224, 316_730_080),
    "a3": ((16, 16, 24, 32, 64, 112, 208, 224, 1984), (3, 3, 3, 5, 3, 3, 3), (1, 4, 4, 4, 4, 6, 6),
           (2, 3, 3, 4, 3, 5, 1), 224, 356_518_400),
    "a4": ((16, 16, 24, 32, 64, 112, 192, 216, 1984), (3, 3, 3, 5, 3, 5, 3), (1, 4, 4, 5, 4, 6, 6),
           (1, 3, 3, 4, 3, 5, 1), 256, 443_530_752),
    "a5": ((16, 16, 24, 32, 72, 112, 192, 216, 1792), (3, 3, 3, 5, 3, 3, 3), (1, 4, 5, 4, 4, 6, 6),
           (1, 3, 3, 3, 4, 6, 1), 256, 490_520_064),
    "a6": ((16, 16, 24, 32, 64, 112, 216, 224, 1984), (3, 3, 3, 3, 3, 5, 3), (1, 4, 6, 5, 4, 6, 6),
           (1, 3, 3, 4, 4, 6, 1), 288, 709_007_232),
}  # fmt: skip


@pytest.mark.parametrize(
    "widths, windows, expansions, depths, size, expected", ATTENTIVE_NAS.values(), ids=ATTENTIVE_NAS
)
def test_attentive_nas_has_its_macs(widths, windows, expansions, depths, size, expected):
    model = AttentiveNas(widths, windows, expansions, depths)
    variables = jax.eval_shape(model.init, jax.random.key(0), images(size))
    sites = aqs.find_sites(model.apply, variables, images(size))
    assert aqs.cost.total_macs(sites) == expected
