import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from absl import logging

from aqt_search.training.checkpoint import (
    CheckpointError,
    CheckpointMismatchError,
    checkpoint_fingerprint,
    delete_after,
    latest_step,
    restore_latest,
    save_checkpoint,
)

# Where one array of a damaged checkpoint cannot be read, orbax closes its event loop while
# tensorstore still reads others, whose results then find it closed: noise, not a lost error.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)


def small_state(seed):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
        "step": jnp.int32(seed),
    }


def all_sorts_state(seed):
    rng = np.random.default_rng(seed)
    params = {"a": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.constant_schedule(1)))
    # every float32 bit pattern class: NaN with payload, infinities, zeros of both signs, subnormal
    patterns = np.array([0x7FC00123, 0xFF800000, 0x7F800000, 0x80000000, 0, 1], np.uint32)
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed + 1, impl="rbg"), 3),
        "raw_key": jax.random.PRNGKey(seed),
        "bf16": jnp.asarray(rng.integers(0, 2**16, 7), jnp.uint16).view(jnp.bfloat16),
        "fp8": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        "int4": jnp.arange(-8, 8, dtype=jnp.int4),
        "int8": np.arange(-128, 128, dtype=np.int8).reshape(2, 128),
        "bits": jnp.asarray(patterns.view(np.float32)),
        "flags": jnp.array([True, False]),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(rng.normal()),
        "numpy64": rng.normal(size=2),
        "numpy_scalar": np.int64(rng.integers(2**60)),
        "transposed": np.asfortranarray(rng.normal(size=(3, 2))),
        "numbers": [3 + seed, 0.1 * seed, bool(seed % 2)],
        "nothing": None,
    }


def bits(leaf):
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        assert isinstance(a, jax.Array) or type(a) is type(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        assert np.shape(a) == np.shape(b)
        assert bits(a) == bits(b)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save_checkpoint(folder, step, small_state(step), {"position": 10 * step})
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = all_sorts_state(1)
    extra = {"data": {"epoch": 3, "state": "é\n"}, "share": 0.1, "list": [1, None, True]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_checkpoint(tmp_path, 7, state, extra)
        restored = restore_latest(tmp_path, all_sorts_state(2))
    assert (restored.step, restored.extra, restored.skipped) == (7, extra, ())
    assert_identical(restored.state, state)
    assert jax.random.key_impl(restored.state["keys"]) == jax.random.key_impl(state["keys"])


def test_arrays_go_where_the_template_is_and_may_be_donated(tmp_path):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = {"placed": jax.device_put(jnp.arange(3.0), sharding), "free": jnp.arange(4.0)}
    save_checkpoint(tmp_path, 0, state)
    restored = restore_latest(tmp_path, state).state
    assert restored["placed"].sharding == sharding
    assert not restored["free"].committed
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    np.testing.assert_array_equal(step(restored)["free"], np.arange(4.0) + 1)


def test_the_last_steps_are_kept(tmp_path):
    assert latest_step(tmp_path / "none") is None
    assert restore_latest(tmp_path / "none", small_state(0)) is None
    for step in (1, 5, 20, 100):
        path = save_checkpoint(tmp_path, step, small_state(step), keep=2)
    assert names(tmp_path) == ["step_000000020", "step_000000100"]
    assert path == tmp_path / "step_000000100"
    assert latest_step(tmp_path) == 100
    save_checkpoint(tmp_path, 10**10, small_state(3), keep=1)
    assert names(tmp_path) == ["step_10000000000"]
    assert restore_latest(tmp_path, small_state(0)).step == 10**10


def test_the_same_step_may_be_saved_again(tmp_path):
    for seed in (1, 2, 3):
        save_checkpoint(tmp_path, 4, small_state(seed), {"seed": seed})
    assert names(tmp_path) == ["step_000000004-2"]
    restored = restore_latest(tmp_path, small_state(0))
    assert (restored.step, restored.extra) == (4, {"seed": 3})
    with pytest.raises(CheckpointError, match=r"step 4, after step 3"):
        save_checkpoint(tmp_path, 3, small_state(3))


def test_another_identity_is_refused_key_by_key(tmp_path):
    save_checkpoint(tmp_path, 1, small_state(1), identity={"a.b": 1, "c": [1, 2], "d": None})
    for wanted in (None, {"a.b": 1, "c": [1, 2], "d": None}):
        assert restore_latest(tmp_path, small_state(0), identity=wanted).step == 1
    with pytest.raises(CheckpointMismatchError) as error:
        restore_latest(tmp_path, small_state(0), identity={"a.b": 2, "c": [1, 2], "e": 0})
    for line in ("a.b: there 1, now 2", "d: there null, now absent", "e: there absent, now 0"):
        assert line in str(error.value)
    assert "c: " not in str(error.value)
    save_checkpoint(tmp_path, 2, small_state(2))  # one without any is taken, as an older one is
    assert restore_latest(tmp_path, small_state(0), identity={"a.b": 2}).step == 2


def test_a_fingerprint_is_of_the_bits_alone(tmp_path):
    assert checkpoint_fingerprint(tmp_path / "none") is None
    found = set()
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_checkpoint(tmp_path / folder, 4, small_state(seed), {"seconds": len(found)})
        found.add(checkpoint_fingerprint(tmp_path / folder))
    assert len(found) == 2
    before = checkpoint_fingerprint(tmp_path / "a")
    save_checkpoint(tmp_path / "a", 5, small_state(5))
    assert checkpoint_fingerprint(tmp_path / "a") != before
    (tmp_path / "a" / "step_000000005" / "manifest.json").write_text("")
    assert checkpoint_fingerprint(tmp_path / "a") == before  # as a restore goes back


def test_a_run_may_go_back(tmp_path):
    for step in (1, 2, 2, 3):
        save_checkpoint(tmp_path, step, small_state(step), keep=3)
    delete_after(tmp_path, 1)
    assert names(tmp_path) == ["step_000000001"]
    save_checkpoint(tmp_path, 2, small_state(2))
    delete_after(tmp_path, 0)
    assert names(tmp_path) == []


def test_any_damage_is_noticed_and_the_one_before_is_used(two_checkpoints, tmp_path):
    """Every file of the newest checkpoint: bits flipped, cut, emptied, removed."""
    rng = np.random.default_rng(0)
    newest = two_checkpoints / "step_000000002"
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 3
    damages = {
        "flip": lambda data: flip_bit(data, rng.integers(8 * len(data))),
        "cut": lambda data: data[: len(data) // 2],
        "empty": lambda data: b"",
        "removed": lambda data: None,
    }
    skipped = dict.fromkeys(damages, 0)
    for case, (file, kind) in enumerate((f, k) for f in files for k in [*damages, "flip"]):
        folder = tmp_path / str(case)
        shutil.copytree(two_checkpoints, folder)
        target = folder / "step_000000002" / file
        data = damages[kind](target.read_bytes())
        target.unlink() if data is None else target.write_bytes(data)
        restored = restore_latest(folder, small_state(0))
        # never wrong bits: either the damage did not matter, or the earlier one is used
        assert restored.step == (1 if restored.skipped else 2), (file, kind)
        assert_identical(restored.state, small_state(restored.step))
        assert restored.extra == {"position": 10 * restored.step}
        skipped[kind] += bool(restored.skipped)
    # of these the arrays and the manifest always matter
    assert all(count >= 2 for count in skipped.values()), skipped


def flip_bit(data, position):
    flipped = bytearray(data)
    flipped[position // 8] ^= 1 << (position % 8)
    return bytes(flipped)


def test_wrong_bits_under_a_right_structure_are_noticed(two_checkpoints, tmp_path):
    """What orbax itself cannot notice: its arrays are whole, and not the ones that were saved."""
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    shutil.rmtree(folder / "step_000000002" / "arrays")
    shutil.copytree(folder / "step_000000001" / "arrays", folder / "step_000000002" / "arrays")
    restored = restore_latest(folder, small_state(0))
    assert restored.step == 1
    assert "leaf kernel" in restored.skipped[0].reason


def test_a_damaged_checkpoint_is_moved_and_its_step_can_be_saved_again(
    two_checkpoints, tmp_path, caplog
):
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    manifest = folder / "step_000000002" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    with caplog.at_level("WARNING", logger="absl"):
        restored = restore_latest(folder, small_state(0))
    assert f"{folder / 'step_000000002'} is damaged" in caplog.text
    assert "going on from the checkpoint of step 1" in caplog.text
    (skipped,) = restored.skipped
    assert skipped.step == 2
    assert "manifest.json" in skipped.reason
    assert skipped.moved_to == folder / "damaged_step_000000002"
    assert skipped.moved_to.is_dir()
    assert names(folder) == ["damaged_step_000000002", "step_000000001"]
    save_checkpoint(folder, 2, small_state(2))
    restored = restore_latest(folder, small_state(0))
    assert (restored.step, restored.skipped) == (2, ())


def test_when_all_are_damaged_nothing_is_moved(two_checkpoints, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    (folder / "step_000000001" / "manifest.json").write_text("garbage")
    shutil.rmtree(folder / "step_000000002" / "arrays")
    for _ in range(2):
        with pytest.raises(CheckpointError) as error:
            restore_latest(folder, small_state(0))
        for word in ("step_000000001", "step_000000002", "not valid JSON", f"Delete {folder}"):
            assert word in str(error.value)
    assert names(folder) == ["step_000000001", "step_000000002"]


@pytest.mark.parametrize(
    "template, words",
    [
        ({"kernel": jnp.zeros((3, 6))}, ["leaf kernel", "float32[3,5]", "float32[3,6]"]),
        ({"kernel": jnp.zeros((3, 5), jnp.bfloat16)}, ["leaf kernel", "bfloat16[3,5]"]),
        ({"step": 0}, ["leaf step", "int32[]", "int[]"]),
        ({"bias": jnp.zeros(2)}, ["leaf bias", "missing there", "float32[2]"]),
        ({"zoo": {"x": jnp.zeros(2)}}, ["leaf zoo/x", "missing there"]),
        ({"step": None}, ["leaf step", "not wanted here"]),
        ({"step": jax.random.key(0)}, ["leaf step", "key<fry>"]),
    ],
)
def test_another_state_is_an_error_that_names_the_leaf(two_checkpoints, template, words):
    with pytest.raises(CheckpointMismatchError) as error:
        restore_latest(two_checkpoints, small_state(0) | template)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert names(two_checkpoints) == ["step_000000001", "step_000000002"]


@pytest.mark.parametrize(
    "arguments, kind, word",
    [
        ({"state": {"name": "resnet"}}, TypeError, "name is a str"),
        ({"state": {"a": np.array([None])}}, TypeError, "a is a ndarray"),
        ({"extra": {"a": {1, 2}}}, TypeError, "set"),
        ({"extra": {"a": float("nan")}}, ValueError, "JSON"),
        ({"keep": 0}, ValueError, "keep is 0"),
        ({"step": -1}, ValueError, "step -1"),
    ],
)
def test_bad_arguments_are_named_and_write_nothing(tmp_path, arguments, kind, word):
    with pytest.raises(kind, match=word):
        save_checkpoint(tmp_path, **{"step": 1, "state": small_state(1)} | arguments)
    assert names(tmp_path) == []


def run_script(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


FULL_DISK = """
import resource, sys
import numpy as np
from pathlib import Path
from aqt_search.training.checkpoint import CheckpointError, restore_latest, save_checkpoint

def state(step, size):
    return {"a": np.random.default_rng(step).normal(size=size)}

folder = Path(sys.argv[1])
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for there in (None, 1):
    # no file may pass 100 kB: every write beyond it fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        save_checkpoint(folder, 2, state(2, 100_000))
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(folder) in message and "step 2" in message and "Free space" in message, message
    assert ("no checkpoint yet" if there is None else "step 1 is whole") in message, message
    if there is None:
        assert list(folder.iterdir()) == []
        save_checkpoint(folder, 1, state(1, 100_000))
found = restore_latest(folder, state(0, 100_000))
assert found.step == 1 and found.skipped == ()
np.testing.assert_array_equal(found.state["a"], state(1, 100_000)["a"])
save_checkpoint(folder, 2, state(2, 100_000))  # with space again, the same step can be saved
assert restore_latest(folder, state(0, 100_000)).step == 2
"""


def test_a_full_disk_is_an_error_and_keeps_the_last_checkpoint(tmp_path):
    result = run_script(FULL_DISK, tmp_path)
    assert result.stderr == ""  # the error alone says it


SAVE_UNTIL_KILLED = """
import os, random, signal, sys, time
import numpy as np
from pathlib import Path
from aqt_search.training.checkpoint import restore_latest, save_checkpoint

folder, acknowledged = Path(sys.argv[1]), Path(sys.argv[2])
random.seed(0)

def state(step):
    return {"a": np.random.default_rng(step).normal(size=50_000), "step": step}

def save_on():
    found = restore_latest(folder, state(0))
    step = found.step if found else 0
    assert step >= int(acknowledged.read_text() or 0), "a finished checkpoint is gone"
    if found:
        assert found.skipped == (), found.skipped
        assert found.state["step"] == step
        np.testing.assert_array_equal(found.state["a"], state(step)["a"])
    while True:
        step += 1
        save_checkpoint(folder, step, state(step), keep=1)
        acknowledged.write_text(str(step))

unfinished = 0
acknowledged.write_text("0")
for round in range(8):
    child = os.fork()  # no thread nor jax backend runs yet in this process
    if child == 0:
        try:
            save_on()
        finally:
            os._exit(1)
    time.sleep(random.uniform(0.4, 0.8))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the child failed by itself"
    unfinished += any(folder.glob(".unfinished_*"))
print(acknowledged.read_text(), unfinished)
"""


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    result = run_script(SAVE_UNTIL_KILLED, folder, tmp_path / "acknowledged")
    steps, unfinished = map(int, result.stdout.split())
    assert steps >= 8  # it went on after each kill
    assert unfinished >= 1  # and at least one kill came in the middle of a save
    template = {"a": np.zeros(50_000), "step": 0}
    found = restore_latest(folder, template)
    assert found.step >= steps
    expected = np.random.default_rng(found.step).normal(size=50_000)
    assert found.state["a"].tobytes() == expected.tobytes()
    save_checkpoint(folder, found.step + 1, found.state)
    assert not [path for path in Path(folder).iterdir() if path.name.startswith(".")]


def test_a_damaged_checkpoint_is_named_in_one_line(two_checkpoints, tmp_path):
    """And not among what other libraries have to say about it."""
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("step_*/arrays/*"):
        shutil.rmtree(path) if path.is_dir() else path.write_bytes(b"garbage")
    code = (
        "import sys, numpy as np\n"
        "from aqt_search.training.checkpoint import CheckpointError, restore_latest\n"
        "template = {'kernel': np.zeros((3, 5), np.float32), 'step': np.int32(0)}\n"
        "try: restore_latest(sys.argv[1], template)\n"
        "except CheckpointError as error: print(error)\n"
    )
    result = run_script(code, tmp_path / "copy")
    assert result.stdout.startswith("all checkpoints in")
    lines = result.stderr.splitlines()
    assert len(lines) == 2, result.stderr
    assert all("is damaged" in line for line in lines)


def test_orbax_is_quiet(tmp_path, capfd):
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        save_checkpoint(tmp_path, 1, small_state(1))
        restore_latest(tmp_path, small_state(0))
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(verbosity)
    assert capfd.readouterr() == ("", "")
