"""Weights as indices and palettes: values, bytes, serving, and the file."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.palette import (
    Palette,
    PaletteError,
    dequantized,
    encoded,
    huffman_bits,
    load,
    palettize,
    save,
    serve,
    tree_nbytes,
)
from aqt_search.palette.storage import PalettedTensor

RNG = np.random.default_rng(0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        return nn.Dense(6, name="head")(x.mean((1, 2)))


X = RNG.normal(size=(3, 5, 5, 4)).astype(np.float32)
RULES = [("head", Palette(3, 2)), (".*", {"bits": 2})]


def same(a, b):
    leaves = [jax.tree.leaves(tree) for tree in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.array_equal(x, y) for x, y in zip(*leaves)
    )


@pytest.fixture(scope="module")
def parts():
    model = Net()
    variables = model.init(jax.random.key(0), X)
    return model, variables, aqs.find_sites(model.apply, variables, X)


@pytest.fixture(scope="module")
def paletted(parts):
    _, variables, sites = parts
    return palettize(variables, sites, RULES)


@pytest.mark.parametrize(
    "bits, dimension, dtype",
    [(1, 1, np.float32), (2, 3, np.float32), (3, 1, jnp.bfloat16), (5, 3, np.float32),
     (8, 2, jnp.bfloat16)],
)  # fmt: skip
def test_every_width_stores_its_values(bits, dimension, dtype):
    """As many values as clusters: nothing is lost; 2^bits indices and one in a byte of its own."""
    i = RNG.permutation(2**bits)
    i = np.append(i, i[0])
    columns = [i, 7 * i % 256, 255 - i]  # integers that bf16 has, too
    w = jnp.asarray(np.stack(columns[:dimension], -1), dtype).reshape(-1, 1)
    sites = aqs.find_sites(lambda p, x: x @ p["w"], {"w": w}, jnp.zeros((1, len(w)), dtype))
    stored = palettize({"w": w}, sites, [(".*", Palette(bits, dimension))])["w"]
    assert stored.dequantize().dtype == dtype
    assert np.array_equal(stored.dequantize(), w)
    packed = math.ceil((2**bits + 1) * bits / 8)
    assert stored.nbytes == packed + 2**bits * dimension * w.dtype.itemsize
    assert stored.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
    assert len(np.unique(np.asarray(stored.indices()))) == 2**bits


def test_every_vector_takes_its_nearest_centroid(parts, paletted):
    _, variables, _ = parts
    for layer, dimension in (("conv", 1), ("head", 2)):
        stored = paletted["params"][layer]["kernel"]
        vectors = np.asarray(variables["params"][layer]["kernel"], float).reshape(-1, dimension)
        palette = np.asarray(stored.palette[0], float)
        distances = np.square(vectors[:, None] - palette).sum(-1)
        assert (np.asarray(stored.indices()[0]) == distances.argmin(1)).all()
        values = palette[distances.argmin(1)].reshape(stored.shape).astype(np.float32)
        assert np.array_equal(stored.dequantize(), values)


def test_serving_is_the_function_on_the_stored_weights(parts, paletted):
    model, variables, _ = parts
    stored = dequantized(paletted)
    assert jax.tree.structure(stored) == jax.tree.structure(variables)
    found = jax.jit(serve(model.apply))(paletted, X)
    np.testing.assert_allclose(found, jax.jit(model.apply)(stored, X), rtol=1e-6, atol=1e-7)
    assert np.array_equal(stored["params"]["head"]["bias"], variables["params"]["head"]["bias"])


def test_bytes_and_their_huffman_size(paletted):
    conv, head = (paletted["params"][name]["kernel"] for name in ("conv", "head"))
    assert conv.nbytes == 3 * 3 * 4 * 8 * 2 // 8 + 4 * 4
    assert head.nbytes == 8 * 6 // 2 * 3 // 8 + 8 * 2 * 4
    assert tree_nbytes(paletted) == conv.nbytes + head.nbytes + 8 * 4 + 6 * 4  # the biases
    counts = np.bincount(np.asarray(conv.indices()).ravel(), minlength=4)
    assert conv.huffman_nbytes() == math.ceil(huffman_bits(counts) / 8) + conv.palette.nbytes


def test_skewed_indices_are_smaller_in_huffman_code():
    values = np.repeat(np.float32([0, 1, 2, 3]), [970, 10, 10, 10])
    sites = aqs.find_sites(lambda p, x: x @ p["w"], {"w": values}, jnp.zeros((1, 1000)))
    stored = palettize({"w": values}, sites, [(".*", Palette(2))])["w"]
    assert stored.data.nbytes == 250
    # Words of 1, 2, 3 and 3 bits, a table of 4 x 2 bits, and the palette.
    assert stored.huffman_nbytes() == math.ceil((970 + 20 + 60 + 8) / 8) + 16


def test_learned_centroids_are_stored_as_they_are(parts):
    _, variables, sites = parts
    rules = [("conv", Palette(2)), ("head", None)]
    centroids = {"conv/kernel": np.float32([-0.4, -0.1, 0.1, 0.4]).reshape(1, 4, 1)}
    stored = palettize(variables, sites, rules, centroids=centroids)["params"]["conv"]["kernel"]
    assert np.array_equal(stored.palette, centroids["conv/kernel"])
    w = np.asarray(variables["params"]["conv"]["kernel"])
    expected = np.float32([-0.4, -0.1, 0.1, 0.4])[np.digitize(w, [-0.25, 0, 0.25])]
    assert np.array_equal(stored.dequantize(), expected)


def test_stacked_layers_have_palettes_of_their_own():
    w = np.stack([RNG.integers(0, 4, (6, 6)), RNG.integers(10, 14, (6, 6))]).astype(np.float32)

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    sites = aqs.find_sites(apply, {"w": w}, jnp.zeros((1, 6)))
    stored = palettize({"w": w}, sites, [(".*", Palette(2))])
    assert stored["w"].palette.shape == (2, 4, 1)
    assert np.array_equal(stored["w"].dequantize(), w)  # 8 values in all, of 4 in each layer


# --- The file -------------------------------------------------------------------------------------


def test_a_file_comes_back_bit_for_bit(tmp_path, paletted):
    odd = paletted | {"more": {"half": jnp.ones((2, 3), jnp.bfloat16), "step": np.int64(2**40)}}
    path = tmp_path / "palette.npz"
    assert save(path, odd) == path.stat().st_size
    found = load(path)
    assert isinstance(found["params"]["conv"]["kernel"], PalettedTensor)
    assert same(found, odd)
    assert np.array_equal(
        found["params"]["conv"]["kernel"].dequantize(),
        paletted["params"]["conv"]["kernel"].dequantize(),
    )
    assert list(tmp_path.iterdir()) == [path]
    assert encoded(odd) == path.read_bytes()


def test_the_files_bytes_are_those_of_the_arrays():
    w = RNG.normal(size=(256, 256)).astype(np.float32)
    sites = aqs.find_sites(lambda p, x: x @ p["w"], {"w": w}, jnp.zeros((1, 256)))
    paletted = palettize({"w": w}, sites, [(".*", Palette(2))], restarts=1, iterations=5)
    size = len(encoded(paletted))
    assert tree_nbytes(paletted) == 256 * 256 // 4 + 16
    assert 0 < size - tree_nbytes(paletted) < 1000  # the header and the format of the file
    assert len(encoded({"w": w})) / size > 15  # of 16, at 2 bits for 32


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-30], lambda b: b[:400] + b"x" + b[401:], lambda b: b"", lambda b: b"{}"],
)
def test_a_damaged_file_is_named(tmp_path, paletted, damage):
    path = tmp_path / "palette.npz"
    path.write_bytes(damage(encoded(paletted)))
    with pytest.raises(PaletteError, match=r"palette\.npz holds no weights"):
        load(path)


def conv_of(value):
    return lambda v: {"params": v["params"] | {"conv": {"kernel": value}}}


@pytest.mark.parametrize(
    "change, rules, options, words",
    [
        (conv_of(jnp.ones((3, 3, 4, 8))), RULES, {}, ["'conv/kernel'", "1 distinct"]),
        (conv_of(jnp.full((3, 3, 4, 8), jnp.nan)), RULES, {}, ["'conv/kernel'", "NaN"]),
        (conv_of(jnp.ones((3, 3, 4, 8), int)), RULES, {}, ["'conv/kernel'", "int32"]),
        (dict, [(".*", Palette(8))], {}, ["'head/kernel'", "48 distinct", "256"]),
        (dict, [(".*", Palette(2, 5))], {}, ["'conv/kernel'", "288", "5"]),
        (dict, RULES, {"restarts": 0}, ["restarts", "0"]),
        (dict, RULES, {"centroids": {}}, ["'conv/kernel'", "only in the rules"]),
        (
            dict, [("head", Palette(2))], {"centroids": {"head/kernel": np.ones((1, 4, 2))}},
            ["'head/kernel'", "(1, 4, 2)", "(1, 4, 1)"],
        ),
        (
            dict, [("head", Palette(2))],
            {"centroids": {"head/kernel": np.full((1, 4, 1), np.nan)}}, ["'head/kernel'", "NaN"],
        ),
    ],
)  # fmt: skip
def test_bad_weights_are_named(parts, change, rules, options, words):
    _, variables, sites = parts
    with pytest.raises(PaletteError) as caught:
        palettize(change(variables), sites, rules, **options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "tree, words", [({1: np.ones(2)}, "key 1"), (np.ones(2), "nested dicts"), ({"a": "b"}, "'a'")]
)
def test_trees_that_cannot_be_saved(tree, words):
    with pytest.raises(PaletteError, match=words):
        encoded(tree)
