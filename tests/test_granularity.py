"""Granularity: shapes of scales, resolution within a product, blocks split and joined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.granularity import (
    free_axes,
    join_blocks,
    resolve,
    scale_shape,
    split_blocks,
)

# Granularity, shape of the tensor, shape of its scales.
SCALES = [
    (aqs.PER_TENSOR, (64, 96), (1, 1)),
    (aqs.PER_TENSOR, (), ()),
    (aqs.per_channel(-1), (64, 96), (1, 96)),
    (aqs.per_channel(0, 1), (64, 96), (64, 96)),
    (aqs.per_channel(1, -1), (64, 96), (1, 96)),
    (aqs.per_channel(-1), (3, 3, 16, 32), (1, 1, 1, 32)),
    (aqs.per_block(32, -1), (64, 96), (64, 3)),
    (aqs.per_block(32, 0), (64, 96), (2, 96)),
    (aqs.per_block(8, 2), (3, 3, 16, 32), (3, 3, 2, 32)),
    (aqs.per_block(7, -2), (16, 5), (3, 5)),  # the last block is shorter
    (aqs.per_block(100, 0), (16, 5), (1, 5)),
    (aqs.per_block(4, 0), (0, 5), (0, 5)),
    (aqs.per_block(1, 0), (3,), (3,)),
    (aqs.PER_TOKEN, (64, 96), (64, 1)),
    (aqs.PER_TOKEN, (2, 3, 4), (2, 3, 1)),
    (aqs.PER_TOKEN, (5,), (1,)),
    (aqs.PER_TOKEN, (), ()),
]


@pytest.mark.parametrize("granularity, shape, expected", SCALES)
def test_shape_of_scales(granularity, shape, expected):
    assert scale_shape(shape, granularity) == expected
    q = aqs.Quantizer("int8", granularity)
    stored = jax.eval_shape(lambda x: aqs.quantize_tensor(x, q), jnp.ones(shape))
    assert stored.scale.shape == expected


# Granularity, number of axes, axes summed over, the same with every axis named.
OPERANDS = [
    (aqs.PER_CHANNEL, 2, (0,), aqs.Granularity((1,))),  # the right side of a matrix product
    (aqs.PER_CHANNEL, 4, (0, 1, 2), aqs.Granularity((3,))),  # a kernel
    (aqs.PER_CHANNEL, 3, (-1,), aqs.Granularity((0, 1))),
    (aqs.PER_CHANNEL, 1, (0,), aqs.Granularity(())),
    (aqs.PER_TENSOR, 2, (0,), aqs.Granularity(())),
    (aqs.PER_TOKEN, 2, (1,), aqs.Granularity((0,), rows=True)),  # the left side of one
    (aqs.PER_TOKEN, 4, (1, 2, 3), aqs.Granularity((0,), rows=True)),  # images
    (aqs.PER_TOKEN, 4, (-1,), aqs.Granularity((0, 1, 2), rows=True)),  # queries
    (aqs.PER_TOKEN, 1, (0,), aqs.Granularity((), rows=True)),
    (aqs.per_channel(-2, 1, 1), 2, (0,), aqs.Granularity((0, 1))),
    (aqs.per_block(8), 4, (0, 1, -2), aqs.Granularity((0, 1, 3), 8, 2)),  # along the last
    (aqs.per_block(8, -1), 2, (0,), aqs.Granularity((0,), 8, 1)),
    (aqs.per_block(8), 2, (), aqs.Granularity((0, 1))),  # nothing to run along
]


@pytest.mark.parametrize("granularity, ndim, contracting, expected", OPERANDS)
def test_axes_left_to_the_product(granularity, ndim, contracting, expected):
    found = resolve(granularity, ndim, contracting)
    assert found == expected
    assert resolve(found, ndim) == found


def test_free_axes():
    assert free_axes(4, (0, -1)) == (1, 2)
    assert free_axes(0, ()) == ()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("axis", range(3))
def test_blocks_are_neighbours_and_join_to_the_tensor(axis, size):
    x = np.arange(1, 61, dtype=np.float32).reshape(3, 4, 5)
    granularity = resolve(aqs.per_block(size, axis), 3)
    blocks = np.asarray(split_blocks(jnp.asarray(x), granularity))
    count = -(-x.shape[axis] // size)
    assert blocks.shape == (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    for n in range(count):
        part = np.take(x, range(n * size, min((n + 1) * size, x.shape[axis])), axis)
        block = np.take(blocks, n, axis)
        np.testing.assert_array_equal(np.take(block, range(part.shape[axis]), axis), part)
        assert not np.take(block, range(part.shape[axis], size), axis).any()  # zeros fill the last
    np.testing.assert_array_equal(join_blocks(jnp.asarray(blocks), granularity, x.shape), x)


def test_without_blocks_a_tensor_stays():
    x = jnp.ones((2, 3))
    assert split_blocks(x, aqs.PER_TENSOR) is x
    assert join_blocks(x, aqs.PER_TENSOR, x.shape) is x


def test_scales_follow_their_elements():
    """Multiplying what shares a scale by a power of two multiplies its values by the same."""
    x = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    for granularity, factor in [
        (aqs.per_channel(0), np.exp2(np.arange(6))[:, None]),
        (aqs.per_channel(-1), np.exp2(np.arange(10))[None]),
        (aqs.per_block(4, 1), np.exp2(np.arange(10) // 4)[None]),  # 4, 4 and 2
        (aqs.per_block(4, 0), np.exp2(np.arange(6) // 4)[:, None]),  # 4 and 2
    ]:
        factor = factor.astype(np.float32)
        q = aqs.Quantizer("int4", granularity)
        expected = np.asarray(aqs.fake_quant(x, q)) * factor
        np.testing.assert_array_equal(aqs.fake_quant(x * factor, q), expected)


def test_wrong_granularities():
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"at least one element; got a block size of {size}"):
            aqs.per_block(size)
    for make in (lambda: aqs.per_block(2.5), lambda: aqs.per_block(2, 0.5)):
        with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
            make()
    with pytest.raises(TypeError, match="'str' object cannot be interpreted as an integer"):
        aqs.per_channel("rows")
    with pytest.raises(ValueError, match=r"Channel axis 2 is out of range .* 2 dimensions"):
        resolve(aqs.per_channel(2), 2)
    with pytest.raises(ValueError, match=r"Channel axis -3 is out of range .* 2 dimensions"):
        resolve(aqs.per_channel(-3), 2, (0,))
    with pytest.raises(ValueError, match=r"Block axis 4 is out of range .* 3 dimensions"):
        resolve(aqs.per_block(2, 4), 3)
    with pytest.raises(ValueError, match=r"per_block needs an axis outside of a product"):
        resolve(aqs.per_block(2), 3)
    with pytest.raises(ValueError, match=r"PER_CHANNEL leaves its axes to a product"):
        resolve(aqs.PER_CHANNEL, 3)
    with pytest.raises(ValueError, match=r"PER_CHANNEL leaves its axes to a product"):
        aqs.fake_quant(jnp.ones((2, 3)), aqs.Quantizer("int4", aqs.PER_CHANNEL))
