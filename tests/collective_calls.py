"""What every process of a run calls, printed as JSON: `tests/test_processes.py` compares runs.

python tests/collective_calls.py COORDINATOR PROCESSES PROCESS
"""

import hashlib
import json
import sys

import flax.linen as nn
import jax
import numpy as np

import aqt_search as aqs
from aqt_search import data
from aqt_search.data.sources import ArraySource
from aqt_search.search.space import make_space
from aqt_search.training.assignment_batch import evaluate_assignments
from aqt_search.training.evaluation import evaluate, reestimate_batch_stats, static_evaluation
from aqt_search.training.parallel import AXIS, data_shard
from aqt_search.training.processes import gathered, is_first, on_first
from experiments.connection import connect


class Net(nn.Module):
    """A convolution and BatchNorm, whose statistics replicas share."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, axis_name=AXIS)(x))
        return nn.Dense(4)(x.mean((1, 2)))


class OddError(ValueError):
    """Cannot be made from its message, so it cannot be sent either."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@on_first
def where():
    return int(jax.process_index())


@on_first
def nested():
    return where(), is_first(), gathered("alone")


@on_first
def large():
    return np.arange(100_000, dtype=np.int64)


def raised(error):
    try:
        on_first(lambda: (_ for _ in ()).throw(error))()
    except Exception as found:
        return type(found).__name__, str(found)


def digest(tree):
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))
    return hashlib.sha256(content).hexdigest()


def main():
    coordinator, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    connect(coordinator, processes, process)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 6, 6, 3), np.uint8)
    source = ArraySource(images, rng.integers(0, 4, 50).astype(np.int32))
    mean, std = data.channel_statistics(source)
    options = {"batch_size": 8, "mean": mean, "std": std}

    def batches(shard=None):
        return data.eval_batches(source, shard=shard, **options)

    variables = jax.tree.map(np.asarray, Net().init(jax.random.key(0), images[:1] / 255))
    sites = aqs.find_sites(Net().apply, variables, np.zeros((1, 6, 6, 3), np.float32))
    formats = aqs.assign(sites, [(".*", "int4")])
    qapply = aqs.quantize(Net().apply, axis_name=AXIS)
    space = make_space(sites, [(".*", ("int2", "int4", "e4m3"))])
    choices = np.stack([np.arange(5) % 3, np.arange(5) // 2], 1)
    stats = reestimate_batch_stats(qapply, formats, variables, batches(data_shard()))
    variables = {**variables, "batch_stats": stats}
    static = static_evaluation(Net().apply, formats, sites, variables, batches(data_shard()))
    many = evaluate_assignments(qapply, jax.vmap(space.assignment)(choices), variables, batches())
    print(
        json.dumps(
            {
                "processes": jax.process_count(),
                "devices": jax.device_count(),
                "first": [where(), nested(), digest(large())],
                "errors": [raised(FileNotFoundError(2, "gone")), raised(OddError("this", "that"))],
                "in order": gathered(["x" * 3000 * (1 + jax.process_index())])[0][0][:5],
                "statistics": digest(stats),
                "scales": digest(static.variables["scales"]),
                "evaluation": evaluate(*static, batches(data_shard())),
                "losses": many.loss.tolist(),
                "accuracies": many.accuracy.tolist(),
            }
        )
    )


if __name__ == "__main__":
    main()
