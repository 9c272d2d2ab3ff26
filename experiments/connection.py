"""Connects the processes of one run, from flags or from what the cluster says."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

import jax

from aqt_search.training.processes import ProcessError, check_agreed, several

WAIT_SECONDS = 300
# A process that gives no sign of life for so long is taken for dead, and ends all others.
_HEARTBEAT_SECONDS = 40
_LOST_STATUS = 1


def _told_by_environment(environment: Mapping[str, str]) -> bool:
    """Whether a launcher says that this process is one of several, as jax.distributed reads it."""
    if "JAX_COORDINATOR_ADDRESS" in environment or "JOB_COMPLETION_INDEX" in environment:
        return True
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return True
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    on_tpu = importlib.util.find_spec("libtpu") is not None
    return on_tpu and "TPU_SKIP_MDS_QUERY" not in environment


def connect(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    wait_seconds: int = WAIT_SECONDS,
) -> None:
    """Joins the processes of a run, before any device is touched.

    Without arguments the environment tells: of TPU VMs, Slurm (srun), Open MPI, Kubernetes, or
    `JAX_COORDINATOR_ADDRESS`; where it tells of no other process, or `processes` is 1, this process
    is alone. Ends the process where the others are not there in `wait_seconds`.

    Args:
      coordinator: HOST:PORT, on which process 0 listens.
      processes: their number.
      process: the number of this one, from 0.
      wait_seconds: how long to wait for the others.

    Raises:
      ProcessError: flags that do not fit together, or to the other processes; a host without an
        address, a port that is in use, or a number that another process of this host has;
        processes of unequal numbers of devices.
    """
    given = coordinator, processes, process
    if given == (None, None, None):
        if not _told_by_environment(os.environ):
            return
    elif processes == 1 and process in (None, 0):
        return
    elif coordinator is None or processes is None or process is None:
        raise ProcessError(
            f"--coordinator is {coordinator}, --processes {processes} and --process {process};"
            " expected all three, such as --coordinator=10.0.0.1:8476 --processes=2 --process=0, or"
            " none, where the cluster tells (TPU VMs, srun, mpirun)."
        )
    else:
        _check(coordinator, processes, process)
        _claim(coordinator, process)
    # SIGTERM is the run's own, which saves; jax would take it as a notice to itself.
    jax.config.update("jax_enable_preemption_service", False)
    with _waiting(coordinator, processes, process, wait_seconds):
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=wait_seconds + 60,  # what waits here says more
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            raise ProcessError(
                f"the processes of this run cannot be connected: {error} Give all of --coordinator,"
                " --processes and --process, or --processes=1 for a run of this process alone."
            ) from error
    if several():
        _check_devices([device.process_index for device in jax.devices()])
        facts = {"version of jax": jax.__version__, "--processes": processes}
        check_agreed(facts, "how they were started")


def _check_devices(owners: Sequence[int]) -> None:
    """Raises ProcessError unless every process has as many devices; sends nothing.

    What is collective otherwise needs equal numbers itself.
    """
    counts = collections.Counter(owners)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"process {number} has {counts[number]}" for number in sorted(counts))
        raise ProcessError(
            f"the processes of this run have unequal numbers of devices: {told}. Start each on as"
            " many (CUDA_VISIBLE_DEVICES, --gpus-per-task)."
        )


def _check(coordinator: str, processes: int, process: int) -> None:
    """Raises ProcessError for flags that do not fit together, or name no host."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ProcessError(
            f"--coordinator is {coordinator!r}; expected HOST:PORT of process 0, such as"
            " 10.0.0.1:8476."
        )
    if processes < 1 or not 0 <= process < processes:
        raise ProcessError(
            f"--process is {process} of --processes {processes}; expected a number from 0 to"
            f" {max(processes, 1) - 1}."
        )
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise ProcessError(
            f"--coordinator is {coordinator!r}, but {host!r} has no address here ({error}). Give"
            " the name or address of process 0's host, which all others can reach."
        ) from error


def _claim(coordinator: str, process: int) -> None:
    """Makes sure that this host starts this process once, and that process 0's port is free.

    jax does neither: two listen on one port, and a second process of a number ends both, and all
    others, by an abort.

    Raises:
      ProcessError: another process has the number, or the port.
    """
    if sys.platform == "linux":  # a name that is freed when its process ends, however it does
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0aqt_search {coordinator} {process}")
        except OSError as error:
            claim.close()
            raise ProcessError(
                f"process {process} of the run at {coordinator} runs on this host already. Give"
                " another --process, or wait until it has ended; another run needs another port of"
                " --coordinator."
            ) from error
        claim.detach()  # open until then
    if process == 0:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        port = int(coordinator.rpartition(":")[2])
        try:
            socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
        except OSError as error:
            raise ProcessError(
                f"--coordinator is {coordinator!r}, but process 0 cannot listen on port {port} of"
                f" this host ({error}). Give all processes another port; or another run is still"
                " there: wait until it has ended."
            ) from error


@contextlib.contextmanager
def _waiting(
    coordinator: str | None, processes: int | None, process: int | None, seconds: int
) -> Iterator[None]:
    """Says that the others are awaited, and ends this process where they do not come.

    jax would end it, too, but by an abort with the stack of its own threads.
    """
    who = "this process" if process is None else f"process {process} of {processes}"
    where = f" at {coordinator}" if coordinator else ""
    print(f"{who}: waiting for the others{where}, {seconds} s at most.", file=sys.stderr)

    def give_up() -> None:
        print(
            f"ProcessError: {who} waited {seconds} s{where}, but not all of the others came. Start"
            " the same command on every host, with the same --coordinator and --processes and a"
            " --process of its own; process 0 listens on that address, which the others must reach"
            " (a firewall?). --wait_seconds waits longer.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(_LOST_STATUS)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
