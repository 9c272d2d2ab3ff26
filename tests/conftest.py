"""Every test runs on two CPU devices, and an implicit rank promotion is an error."""

import atexit
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

# Read when JAX starts its backend, so set before anything imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
).strip()

# Tests build the same programs over and over, in processes of their own too: those of one worker
# are kept until it ends. Not shared by workers, as JAX writes its files in place.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="aqt_search_programs_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

# As from a terminal: started in the background a process ignores it, and so do those it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many short-lived objects; looking through all others for cycles as often as Python
# does by default takes a twentieth of the suite.
gc.set_threshold(100_000, 50, 50)


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file():
    """Every compiled program is mapped into memory in several pieces, and Linux allows a process
    65,530: a worker that keeps the programs of the whole suite crashes near its end.
    """
    yield
    jax.clear_caches()
    gc.collect()


def free_port():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@pytest.fixture(scope="module")
def endpoint():
    """An emulated S3, told to all clients by the environment, as a user would."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    values = {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": address,
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except (urllib.error.URLError, TimeoutError):
                assert server.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
        yield address
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def client(endpoint):
    """Another way to look at the store than that of the code."""
    client = pytest.importorskip("boto3").client("s3")
    client.create_bucket(Bucket="runs")
    yield client
    client.close()


# The files that take longest, first: at the end no worker waits for the other.
_FIRST = (
    "experiments", "processes", "ray_sweep", "bucket_workdir", "one_shot", "contracts", "freeze",
    "transform", "ptq_experiment", "loop", "scales", "fuzz", "own_loop", "range_loss", "stateful",
    "quantizer", "documentation",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sorts the files; within a file tests stay in their order."""
    places = {f"test_{name}": place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
