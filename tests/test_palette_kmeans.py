"""k-means against scikit-learn's and brute force, and Huffman lengths against hand and entropy."""

import itertools
import math

import numpy as np
import pytest
from sklearn.cluster import KMeans

from aqt_search.palette import PaletteError, huffman_bits, huffman_lengths, kmeans
from aqt_search.palette.kmeans import nearest

RNG = np.random.default_rng(0)
WEIGHTS = {
    "scalar": RNG.normal(size=(3000, 1)),
    "heavy_tails": RNG.standard_t(2, (3000, 1)),
    "vectors": RNG.normal(size=(1200, 4)),
}


def inertia64(vectors, centroids, indices):
    return np.square(vectors.astype(float) - centroids.astype(float)[indices]).sum()


def nearest64(vectors, centroids):
    return np.square(vectors[:, None] - centroids[None]).sum(-1)


@pytest.mark.parametrize("clusters", [2, 16])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_as_good_as_scikit_learn(kind, clusters):
    vectors = WEIGHTS[kind].astype(np.float32)
    found = kmeans(vectors, clusters, seed=1)
    assert found.inertia == pytest.approx(
        inertia64(vectors, found.centroids, found.indices), rel=1e-4
    )
    other = KMeans(clusters, n_init=3, random_state=0).fit(vectors.astype(float))
    # Two local minima of several starts each; those of 16 clusters differ by about 2 %.
    assert found.inertia <= 1.05 * other.inertia_
    distances = nearest64(vectors.astype(float), found.centroids.astype(float))
    chosen = np.take_along_axis(distances, found.indices[:, None].astype(int), 1)[:, 0]
    np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-4, atol=1e-6)
    order = np.lexsort(found.centroids.T[::-1])
    assert (order == np.arange(clusters)).all()


def test_the_best_split_of_few_weights():
    """Clusters of sorted scalars are intervals: all splits into three can be tried."""
    w = np.sort(RNG.normal(size=14)).astype(np.float32)

    def cost(part):
        return np.square(part.astype(float) - part.astype(float).mean()).sum()

    best = min(
        cost(w[:a]) + cost(w[a:b]) + cost(w[b:]) for a, b in itertools.combinations(range(1, 14), 2)
    )
    found = kmeans(w[:, None], 3, restarts=10)
    assert found.inertia == pytest.approx(best, rel=1e-5)


def test_weights_of_as_many_values_as_clusters_are_exact():
    values = np.float32([-256, -1.5, 2.0**-10, 7.0])  # whose means are exact
    w = RNG.permutation(np.repeat(values, 50))[:, None]
    found = kmeans(w, 4)
    assert (np.sort(found.centroids[:, 0]) == values).all()
    assert (found.centroids[found.indices] == w).all()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_scale_changes_nothing_else(scale):
    vectors = WEIGHTS["scalar"].astype(np.float32)
    plain, scaled = kmeans(vectors, 4), kmeans(vectors * np.float32(scale), 4)
    assert (scaled.indices == plain.indices).all()
    assert (scaled.centroids == plain.centroids * np.float32(scale)).all()


def test_equal_seeds_give_equal_clusters():
    vectors = WEIGHTS["vectors"].astype(np.float32)
    one, two = kmeans(vectors, 16, seed=3), kmeans(vectors, 16, seed=3)
    assert (one.centroids == two.centroids).all()
    assert (one.indices == two.indices).all()


def test_more_vectors_than_are_looked_at_at_once():
    """70,001 x 16 distances are taken in parts, the last of which overlaps the one before."""
    vectors = RNG.normal(size=(70_001, 1)).astype(np.float32)
    centroids = np.sort(RNG.normal(size=(16, 1)), 0).astype(np.float32)
    expected = nearest64(vectors, centroids).argmin(1)
    assert (np.asarray(nearest(vectors, centroids)) == expected).all()
    found = kmeans(vectors, 16, restarts=1, iterations=2)
    assert found.inertia == pytest.approx(
        inertia64(vectors, found.centroids, found.indices), rel=1e-4
    )
    # Of a normal distribution the best 16 levels leave 0.0095 (Max 1960); two iterations, more.
    assert 0.0095 * 0.97 < found.inertia / len(vectors) < 0.0095 * 1.6


@pytest.mark.parametrize(
    "vectors, clusters, words",
    [
        (np.ones((9, 1)), 2, ["'conv/kernel'", "1 distinct weights", "2 clusters"]),
        (np.repeat(np.eye(3), 4, 0), 4, ["3 distinct vectors of 3", "4 clusters"]),
        (np.array([[1.0], [np.nan]]), 2, ["'conv/kernel'", "NaN"]),
        (np.array([[1.0], [np.inf]]), 2, ["'conv/kernel'", "infinite"]),
        (np.eye(3), 257, ["257"]),
    ],
)
def test_bad_weights_are_named(vectors, clusters, words):
    with pytest.raises(PaletteError) as caught:
        kmeans(vectors.astype(np.float32), clusters, name="conv/kernel")
    assert all(word in str(caught.value) for word in words)


# --- Huffman --------------------------------------------------------------------------------------


def test_huffman_lengths_by_hand():
    """15, 7, 6, 6, 5: 5 + 6 = 11, 6 + 7 = 13, 11 + 13 = 24, 24 + 15."""
    assert huffman_lengths([15, 7, 6, 6, 5]).tolist() == [1, 3, 3, 3, 3]
    assert huffman_bits([15, 7, 6, 6, 5]) == 15 + 3 * (7 + 6 + 6 + 5) + 5 * 3
    assert huffman_lengths([1, 2, 4, 8]).tolist() == [3, 3, 2, 1]
    assert huffman_lengths([0, 9, 0, 0]).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("clusters", [2, 4, 16, 256])
def test_huffman_codes_are_prefix_codes_near_the_entropy(clusters):
    counts = RNG.geometric(0.02, clusters) - 1
    counts[0] += 1
    lengths = huffman_lengths(counts)
    used = counts > 0
    assert (lengths[used] > 0).all()
    assert (lengths[~used] == 0).all()
    assert lengths.max() < clusters
    assert np.sum(0.5 ** lengths[used]) == 1 or used.sum() == 1  # Kraft: complete
    p = counts[used] / counts.sum()
    entropy, mean = -np.sum(p * np.log2(p)), np.sum(p * lengths[used])
    assert entropy - 1e-9 <= mean < entropy + 1 or used.sum() == 1
    table = clusters * max(1, math.ceil(math.log2(clusters)))
    assert huffman_bits(counts) == np.sum(counts * lengths) + table


@pytest.mark.parametrize("counts", [[], [0, 0], [1, -1], [[1, 2]]])
def test_counts_of_nothing(counts):
    with pytest.raises(ValueError, match="Huffman"):
        huffman_lengths(counts)
