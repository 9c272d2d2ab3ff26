"""The loop: what a kill, a signal, a NaN and a damaged file leave behind, to the bit."""

import contextlib
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_search.training import parallel
from aqt_search.training.checkpoint import CheckpointError, CheckpointMismatchError
from aqt_search.training.loop import (
    CHECKPOINT_FOLDER,
    DivergedError,
    InterruptedRunError,
    Run,
    Schedule,
    run_side_by_side,
    run_steps,
)
from aqt_search.training.metrics import read_metrics
from aqt_search.training.workdir import WorkdirError, lock_workdir

ROOT = Path(__file__).parent.parent

# --- A step that is soon compiled, in this process ------------------------------------------------


class Numbers:
    """A stream whose batches depend on their number alone."""

    def __init__(self):
        self.number, self.closed = 0, False

    def __next__(self):
        self.number += 1
        return {"x": np.random.default_rng(self.number).normal(size=(4, 3)).astype(np.float32)}

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]

    def close(self):
        self.closed = True


def toy_step(state, inputs, batch, other):
    key = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
    noise = jax.random.normal(jax.random.fold_in(key, parallel.replica_index()), (3,))
    gradient = jax.lax.pmean(jnp.mean(batch["x"] * other["x"], 0) + noise, parallel.AXIS)
    weights = 0.9 * state["weights"] - 0.1 * gradient
    metrics = {"loss": jnp.sum(weights**2), "accuracy": jnp.float32(0.5)}
    return {"weights": weights, "step": state["step"] + 1, "rng": state["rng"]}, metrics


def start():
    key = jax.random.key_data(jax.random.key(3))
    return {"weights": jnp.ones(3), "step": jnp.int32(0), "rng": key}


def run(workdir, steps=20, step=toy_step, schedule=(3, 5), epoch_steps=0, **options):
    streams = [Numbers(), Numbers()]
    streams[1].number = 1000
    with lock_workdir(workdir):
        one = Run(workdir, start(), streams, **options)
        return run_steps(step, one, Schedule(steps, *schedule, epoch_steps))


def first_weight(state):
    return {"first": float(parallel.unreplicate(state["weights"])[0])}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return run(workdir, describe=first_weight), workdir


def same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def checkpoints(workdir):
    return sorted(path.name for path in (workdir / CHECKPOINT_FOLDER).iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_streams_are_closed_at_the_end(tmp_path, fails):
    def check(step, metrics):
        if fails:
            raise ValueError("looked at")

    streams = [Numbers(), Numbers()]
    with lock_workdir(tmp_path), contextlib.suppress(ValueError):
        run_steps(toy_step, Run(tmp_path, start(), streams, check=check), Schedule(3, 1, 3))
    assert [stream.closed for stream in streams] == [True, True]


def test_records_are_means_over_the_steps_since_the_last(undisturbed):
    result, workdir = undisturbed
    # log_every is 3, checkpoint_every 5; the last step is both.
    records = read_metrics(workdir)
    assert [r["step"] for r in records] == [3, 5, 6, 9, 10, 12, 15, 18, 20]
    losses = []
    compiled, state = parallel.pmap_step(toy_step, donate_state=False), parallel.replicate(start())
    one, other = Numbers(), Numbers()
    other.number = 1000
    for _ in range(20):
        state, metrics = compiled(state, (), parallel.shard(next(one)), parallel.shard(next(other)))
        losses.append(float(metrics["loss"][0]))
    for before, record in zip([{"step": 0}, *records], records):
        mean = np.mean(losses[before["step"] : record["step"]])
        assert record["loss"] == pytest.approx(mean, rel=1e-6)
    same_bits(result.state, parallel.unreplicate(state))
    assert records[-1]["first"] == float(result.state["weights"][0])
    assert checkpoints(workdir) == ["step_000000015", "step_000000020"]
    assert result.seconds > 0


def test_a_finished_run_does_no_more_steps(undisturbed):
    result, workdir = undisturbed
    before = (workdir / "metrics.jsonl").read_bytes()
    (workdir / CHECKPOINT_FOLDER / ".unfinished_step_000000010").mkdir()  # of a killed deletion
    again = run(workdir, step=None)  # would raise if it were called
    same_bits(again.state, result.state)
    assert again.seconds == pytest.approx(result.seconds, abs=1.0)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert checkpoints(workdir) == ["step_000000015", "step_000000020"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(undisturbed, tmp_path, number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRunError, match=rf"{number.name}: saved step 7 of 20.*go on"):
        run(tmp_path, check=killing(at=6, number=number), describe=first_weight)
    assert checkpoints(tmp_path)[-1] == "step_000000007"
    assert signal.getsignal(number) is before
    capsys.readouterr()
    same_bits(run(tmp_path, describe=first_weight, epoch_steps=4).state, undisturbed[0].state)
    err = capsys.readouterr().err
    assert f"{tmp_path.name}: going on from step 7 of 20 (epoch 1.75 of 5)." in err
    same_records(tmp_path, undisturbed[1])
    run(tmp_path, describe=first_weight)
    assert f"{tmp_path.name}: all 20 steps are done already." in capsys.readouterr().err


def killing(at, number=signal.SIGTERM):
    """A check that sends this process a signal, which ends the run after the step it is in."""

    def check(step, metrics):
        if step == at:
            os.kill(os.getpid(), number)

    return check


def same_records(one, other):
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def test_stopped_at_each_of_its_steps_a_run_leaves_the_same_records(undisturbed, tmp_path):
    """Records are due at 3, 5, 6, 9, 10, ...: before, at and after one."""

    class Counted(Numbers):
        def __next__(self):
            os.kill(os.getpid(), signal.SIGTERM)  # at every step
            return super().__next__()

    for stop in range(1, 20):
        other = Numbers()
        other.number = 1000
        one = Run(tmp_path, start(), [Counted(), other], describe=first_weight)
        with lock_workdir(tmp_path), pytest.raises(InterruptedRunError, match=f"step {stop} of"):
            run_steps(toy_step, one, Schedule(20, 3, 5))
        assert read_metrics(tmp_path) == [
            record for record in read_metrics(undisturbed[1]) if record["step"] <= stop
        ]
    same_bits(run(tmp_path, describe=first_weight).state, undisturbed[0].state)
    same_records(tmp_path, undisturbed[1])


@pytest.mark.parametrize("stop", [2, 6, 9])
def test_a_check_that_looks_back_sees_the_same_steps_after_a_stop(tmp_path, stop):
    """It raises at step 13 once it has seen the 8 steps before, as it does undisturbed."""

    def guard(stop=None):
        seen = []

        def check(step, metrics):
            seen.append((step, float(metrics["loss"])))
            if step == 13:
                raise DivergedError(repr(seen[-9:]))
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        return check

    with pytest.raises(DivergedError) as whole:
        run(tmp_path / "whole", check=guard(), looks_back=8)
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "stopped", check=guard(stop), looks_back=8)
    with pytest.raises(DivergedError) as resumed:
        run(tmp_path / "stopped", check=guard(), looks_back=8)
    assert str(resumed.value) == str(whole.value)
    assert len(eval(str(whole.value))) == 9


# --- A folder that is deleted, or of another run --------------------------------------------------


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_run_whose_folder_was_deleted_saves_nothing_there(tmp_path, made_anew):
    workdir = tmp_path / "run"

    def delete(step, metrics):
        if step == 9:
            shutil.rmtree(workdir)
            if made_anew:  # by another process
                code = "import sys; from aqt_search.training.workdir import lock_workdir\n"
                code += "with lock_workdir(sys.argv[1]): pass"
                subprocess.run([sys.executable, "-c", code, workdir], check=True)

    with pytest.raises(WorkdirError, match="was deleted or replaced"):
        run(workdir, check=delete)
    assert not (workdir / CHECKPOINT_FOLDER).exists()
    assert not made_anew or os.listdir(workdir) == ["run.lock"]


def test_a_checkpoint_of_another_run_is_refused(undisturbed, tmp_path):
    one, other = {"seed": 0, "rate": 0.1}, {"seed": 0, "rate": 0.2}
    run(tmp_path, steps=10, identity=one)
    with pytest.raises(CheckpointMismatchError, match=r"another run:\n  rate: there 0.1, now 0.2"):
        run(tmp_path, identity=other)
    same_bits(run(tmp_path, identity=one).state, undisturbed[0].state)


def test_a_truncated_checkpoint_is_passed_over(undisturbed, tmp_path, caplog):
    def stop(step, metrics):
        if step == 12:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, check=stop, describe=first_weight)
    newest = tmp_path / CHECKPOINT_FOLDER / "step_000000010"
    truncate(newest)
    with caplog.at_level("WARNING", logger="absl"):
        result = run(tmp_path, describe=first_weight)
    assert "step_000000010 is damaged" in caplog.text
    assert "going on from the checkpoint of step 5" in caplog.text
    same_bits(result.state, undisturbed[0].state)
    assert read_metrics(tmp_path) == read_metrics(undisturbed[1])


def truncate(checkpoint):
    """Cuts the largest file of a checkpoint's arrays in half."""
    files = [path for path in (checkpoint / "arrays").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    def diverging(state, inputs, batch, other):
        state, metrics = toy_step(state, inputs, batch, other)
        loss = jnp.where(state["step"] == 13, float(bad), metrics["loss"])
        return state, metrics | {"loss": loss}

    with pytest.raises(DivergedError) as caught:
        run(tmp_path, step=diverging)
    for words in (
        "loss became NaN or infinite at step 13",
        "step 10",
        "learning rate",
        "--workdir",
    ):
        assert words in str(caught.value)
    assert checkpoints(tmp_path) == ["step_000000005", "step_000000010"]
    assert max(r["step"] for r in read_metrics(tmp_path)) == 12


def test_a_loss_that_is_never_finite_leaves_no_checkpoint(tmp_path):
    def diverging(state, inputs, batch, other):
        state, metrics = toy_step(state, inputs, batch, other)
        return state, metrics | {"loss": jnp.float32(jnp.nan)}

    with pytest.raises(DivergedError, match=r"at step 1; no checkpoint was saved before it"):
        run(tmp_path, step=diverging)


def test_what_runs_leave_in_memory_is_let_go_of(tmp_path):
    def one_run(number):
        def step(*arguments):
            return toy_step(*arguments)

        run(tmp_path / str(number), step=step)
        return weakref.ref(step)

    one_run(0)  # what all runs share
    client = jax.devices()[0].client
    before = len(client.live_executables())
    steps = [one_run(number) for number in range(1, 4)]
    parallel.release_programs()
    gc.collect()
    assert [step() for step in steps] == [None] * 3
    assert len(client.live_executables()) <= before


# --- What the host does on the way ----------------------------------------------------------------


def test_a_turn_changes_the_state_before_its_step(tmp_path):
    seen = []

    def turn(state):
        seen.append(int(state["step"]))
        return state | {"weights": np.float32([5.0, 6.0, 7.0])}

    def noted(state):
        return {"first": float(parallel.unreplicate(state["weights"])[0])}

    run(tmp_path / "plain", steps=5, schedule=(1, 5))
    whole = run(tmp_path / "whole", turns={6: turn}, schedule=(1, 5), describe=noted)
    assert seen == [5]
    first = [record["first"] for record in read_metrics(tmp_path / "whole")]
    before = [record["loss"] for record in read_metrics(tmp_path / "plain")]
    assert [record["loss"] for record in read_metrics(tmp_path / "whole")][:5] == before
    # 0.9 * 5 and a gradient of mean products and one draw of noise, all of standard deviation 1.
    assert abs(first[5] - 4.5) < 0.1 * 6
    # Ended just before the turn, a run does it when it goes on; after it, it does not again.
    for steps in (5, 10):
        run(tmp_path / str(steps), steps=steps, turns={6: turn}, schedule=(1, 5))
        seen.clear()
        end = run(tmp_path / str(steps), turns={6: turn}, schedule=(1, 5))
        assert seen == ([5] if steps == 5 else [])
        same_bits(end.state, whole.state)


# --- Runs side by side ----------------------------------------------------------------------------


def scaled_step(state, factor, batch):
    """A run of its own: its factor makes it diverge where it is NaN."""
    assert jax.lax.axis_size(parallel.AXIS) == 1
    gradient = jax.lax.pmean(jnp.mean(batch["x"], 0), parallel.AXIS)
    weights = 0.9 * state["weights"] - factor * gradient
    bad = jnp.isnan(factor) & (state["step"] == 7)
    weights = jnp.where(jnp.isnan(factor), state["weights"], weights)
    loss = jnp.where(bad, jnp.nan, jnp.sum(weights**2))
    return state | {"weights": weights, "step": state["step"] + 1}, {"loss": loss}


def side_by_side(workdir, factors, steps=12, turns=({}, {}, {})):
    streams = [Numbers() for _ in factors]
    for number, stream in enumerate(streams):
        stream.number = 100 * number
    runs = [
        Run(
            workdir / str(i),
            start(),
            [stream],
            np.float32(factor),
            describe=first_weight,
            turns=turns[i],
        )
        for i, (factor, stream) in enumerate(zip(factors, streams))
    ]
    with contextlib.ExitStack() as locks:
        for one in runs:
            locks.enter_context(lock_workdir(one.workdir))
        return run_side_by_side(scaled_step, runs, Schedule(steps, 3, 5))


def test_runs_side_by_side_are_runs_of_their_own(tmp_path):
    results = side_by_side(tmp_path, (0.1, 0.5))
    alone = jax.jit(jax.vmap(
        scaled_step, in_axes=None, out_axes=None, axis_name=parallel.AXIS, axis_size=1
    ))  # fmt: skip
    for number, (factor, result) in enumerate(zip((0.1, 0.5), results)):
        state, stream = start(), Numbers()
        stream.number = 100 * number
        for _ in range(12):
            state, _ = alone(state, np.float32(factor), next(stream))
        np.testing.assert_allclose(result.state["weights"], state["weights"], rtol=1e-6)
        last = read_metrics(tmp_path / str(number))[-1]
        assert last["step"] == 12
        assert last["first"] == float(result.state["weights"][0])
        assert checkpoints(tmp_path / str(number)) == ["step_000000010", "step_000000012"]
    assert (results[0].state["weights"] != results[1].state["weights"]).all()


def test_one_run_that_diverges_does_not_stop_the_others(tmp_path):
    bad, good = side_by_side(tmp_path, (np.nan, 0.5))
    assert isinstance(bad, DivergedError)
    assert "at step 8" in str(bad)
    same_bits(good.state, side_by_side(tmp_path / "again", (0.1, 0.5))[1].state)
    assert checkpoints(tmp_path / "0") == ["step_000000005"]
    assert all(isinstance(r, DivergedError) for r in side_by_side(tmp_path / "x", (np.nan,) * 2))


def test_a_turn_is_of_one_run_alone(tmp_path):
    plain = side_by_side(tmp_path / "plain", (0.1, 0.5))

    def double(state):
        return state | {"weights": 2 * state["weights"]}

    def fail(state):
        raise DivergedError("the scores are not finite")

    one, other = side_by_side(tmp_path / "one", (0.1, 0.5), turns=({4: double}, {}))
    same_bits(other.state, plain[1].state)
    assert (one.state["weights"] != plain[0].state["weights"]).all()
    one, other = side_by_side(tmp_path / "failed", (0.1, 0.5), turns=({4: fail}, {}))
    same_bits(other.state, plain[1].state)
    assert isinstance(one, DivergedError)


def test_runs_side_by_side_resume_to_the_same_bits(tmp_path):
    whole = side_by_side(tmp_path / "whole", (0.1, 0.5))
    side_by_side(tmp_path / "parts", (0.1, 0.5), steps=7)
    for one, other in zip(side_by_side(tmp_path / "parts", (0.1, 0.5)), whole):
        same_bits(one.state, other.state)


def test_a_run_says_when_it_goes_on_on_other_devices(tmp_path, capsys):
    def on_one_device(steps):
        with lock_workdir(tmp_path):
            one = Run(tmp_path, start(), [Numbers(), Numbers()])
            run_side_by_side(toy_step, [one], Schedule(steps, 3, 5))

    run(tmp_path, steps=7)
    run(tmp_path, steps=8)
    assert "goes on on" not in capsys.readouterr().err
    on_one_device(steps=9)
    assert "It ran on 2 devices and goes on on 1 device, with" in capsys.readouterr().err
    on_one_device(steps=10)
    assert "goes on on" not in capsys.readouterr().err


def test_runs_side_by_side_go_on_from_a_step_that_all_have(tmp_path, caplog):
    whole = side_by_side(tmp_path / "whole", (0.1, 0.5))
    folders = [tmp_path / "parts" / str(number) / CHECKPOINT_FOLDER for number in range(2)]
    damaged = (("step_000000007",), ("step_000000007", "step_000000005"))
    for count, names in enumerate(damaged, 1):
        side_by_side(tmp_path / "parts", (0.1, 0.5), steps=7)
        for name in names:
            truncate(folders[0] / name)
        if count == 1:
            caplog.clear()
            ended = side_by_side(tmp_path / "parts", (0.1, 0.5))
            assert "1 goes back from step 7 to 5" in caplog.text
            for one, other in zip(ended, whole):
                same_bits(one.state, other.state)
            for number in range(2):
                same_records(tmp_path / "parts" / str(number), tmp_path / "whole" / str(number))
            shutil.rmtree(tmp_path / "parts")
    # All that one has is damaged: it fails, and the other ends as it would.
    failed, other = side_by_side(tmp_path / "parts", (0.1, 0.5))
    assert isinstance(failed, CheckpointError)
    same_bits(other.state, whole[1].state)
    side_by_side(tmp_path / "new", (0.1,), steps=7)  # the second has none yet
    for one, other in zip(side_by_side(tmp_path / "new", (0.1, 0.5)), whole):
        same_bits(one.state, other.state)
    with pytest.raises(ValueError, match="3 runs side by side need as many devices; got 2"):
        side_by_side(tmp_path / "many", (0.1,) * 3)


# --- The search from the command line, killed -----------------------------------------------------

STEPS, CHECKPOINT_EVERY = 12, 3
COMMAND = (
    "--config=configs/digits_resnet8.py", "--config.model.width=0.25", "--config.batch_size=32",
    f"--config.epochs={STEPS / 40}", "--config.optimizer.warmup_epochs=0.0",
    "--config.log_every=2", f"--config.checkpoint_every={CHECKPOINT_EVERY}",
    "--config.search.space=(('stem', 'int8'), ('.*', ('e2m1', 'int4', 'e4m3', 'int8')))",
    "--config.search.target=2.0", "--config.search.searcher=critic",
    "--config.evaluation.calibration_batches=2",
)  # fmt: skip


class Killed:
    """A search that is started as often as it takes."""

    def __init__(self, folder, name):
        self.workdir = folder / name
        data = f"--config.data.data_dir={folder / 'data'}"
        module = [sys.executable, "-m", "experiments.search"]
        self.command = [*module, *COMMAND, data, f"--workdir={self.workdir}"]
        # Restarts then compile nothing.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        # Soon compiled: what is compiled is not what is tested here.
        flags = f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0"
        self._environment = os.environ | cache | {"XLA_FLAGS": flags}

    def start(self, *, at=None, number=None):
        """Runs to the end, or sends a signal when metrics.jsonl has reached a step."""
        process = subprocess.Popen(
            self.command, cwd=ROOT, env=self._environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            while at is not None and process.poll() is None:
                if self.last_step() >= at:
                    process.send_signal(number)
                    break
                time.sleep(0.005)
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        return process.returncode, out, err

    def last_step(self):
        path = self.workdir / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def records(self):
        return read_metrics(self.workdir)

    def manifest(self):
        """Name, shape, dtype and CRC-32 of every array of the last checkpoint."""
        folder = self.workdir / CHECKPOINT_FOLDER / f"step_{STEPS:09d}"
        return json.loads((folder / "manifest.json").read_text())["content"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    search = Killed(tmp_path_factory.mktemp("searches"), "whole")
    code, out, err = search.start()
    assert code == 0, err
    assert "test accuracy" in out
    return search


def test_a_killed_search_ends_in_the_bits_of_an_undisturbed_one(whole):
    search = Killed(whole.workdir.parent, "killed")
    # Before the first checkpoint, and between two of them.
    for at in (2, 7):
        code, _, err = search.start(at=at, number=signal.SIGKILL)
        assert code == -signal.SIGKILL, err
        assert at <= search.last_step() < STEPS
    code, _, err = search.start(at=9, number=signal.SIGTERM)
    assert code == 130, err
    assert "SIGTERM: saved step" in err
    assert "Run the same command again" in err
    assert "Traceback" not in err
    newest = max((search.workdir / CHECKPOINT_FOLDER).glob("step_*"))
    assert int(newest.name.removeprefix("step_")) >= search.last_step()
    truncate(newest)
    code, _, err = search.start()
    assert code == 0, err
    assert f"{newest.name} is damaged" in err

    one, other = whole.manifest(), search.manifest()
    assert len(one["leaves"]) > 40
    assert any(leaf["name"].startswith("search/policy/logits") for leaf in one["leaves"])
    assert one["leaves"] == other["leaves"]
    assert one["extra"]["streams"] == other["extra"]["streams"]
    assert [r["step"] for r in whole.records()] == [2, 3, 4, 6, 8, 9, 10, 12]
    same_records(search.workdir, whole.workdir)
    results = [json.loads((s.workdir / "result.json").read_text()) for s in (whole, search)]
    for result, run_of in zip(results, (whole, search)):
        command = shlex.split(result["command"])  # as one may paste it into a shell
        assert command == ["python", *run_of.command[1:]]
        for key in ("name", "seconds", "command"):
            del result[key]
    assert results[0] == results[1]
    for name in ("policy.json", "space.json", "probabilities.jsonl"):
        assert (search.workdir / name).read_bytes() == (whole.workdir / name).read_bytes()


def test_the_manifest_tells_bits_apart(whole):
    """The comparison above rests on CRCs: they are of the arrays, and the policy has moved."""
    leaves = {leaf["name"]: leaf for leaf in whole.manifest()["leaves"]}
    logits = leaves["search/policy/logits"]
    zeros = np.zeros(logits["shape"], logits["dtype"])
    assert logits["crc32"] != zlib.crc32(zeros.tobytes())
