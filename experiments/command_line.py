"""The command line of every job, and how it ends: user errors are printed without a traceback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from aqt_search import AssignmentError
from aqt_search.data import DataError
from aqt_search.numerics.formats import FormatError
from aqt_search.palette import PaletteError
from aqt_search.ptq import PTQError
from aqt_search.report import ReportError
from aqt_search.search.options import SpaceError
from aqt_search.tracing.rules import RuleError
from aqt_search.tracing.sites import SiteError
from aqt_search.training.checkpoint import CheckpointError
from aqt_search.training.guard import CollapsedSearchError
from aqt_search.training.loop import DivergedError, InterruptedRunError
from aqt_search.training.metrics import MetricsError
from aqt_search.training.processes import ProcessError, check_agreed, is_first, several
from aqt_search.training.storage import as_path, in_bucket
from aqt_search.training.workdir import WorkdirError, identity_of
from experiments.allocator import keep_freed_memory
from experiments.connection import WAIT_SECONDS, connect
from experiments.from_config import HOW_READ, ConfigError
from experiments.job import started_module
from experiments.schema import SCHEMA, check, near, with_homes
from experiments.start_record import start_record


class FailedJobError(RuntimeError):
    """A job that ended without a result."""


# What a user, a disk or the data did wrong, each with a message that says what to do.
USER_ERRORS = (
    AssignmentError,
    CheckpointError,
    CollapsedSearchError,
    ConfigError,
    DataError,
    DivergedError,
    FailedJobError,
    FormatError,
    MetricsError,
    PTQError,
    PaletteError,
    ProcessError,
    ReportError,
    RuleError,
    SiteError,
    SpaceError,
    WorkdirError,
)
_INTERRUPTED_STATUS = 130
_LAST_WORDS_SECONDS = 1.0
Check = Callable[[ml_collections.ConfigDict], None]
Record = Callable[[ml_collections.ConfigDict], str]


def quiet_logs() -> None:
    """Shows warnings and errors only, unless the command line asks for another --verbosity."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Prints user errors to standard error and exits with 1.

    In a run of several processes any error ends this one at once, which ends the others.
    """
    quiet_logs()
    try:
        yield
    except USER_ERRORS as error:
        _end(f"{type(error).__name__}: {error}")
    except Exception as error:
        if not several() or isinstance(error, InterruptedRunError):
            raise
        lost = _OTHERS_LOST.search(str(error))
        _end(f"{_LOST} ({str(error).strip()[:200]})" if lost else traceback.format_exc())


# What collectives say when a process at their other end is gone.
_OTHERS_LOST = re.compile("Gloo|NCCL|coordination service|heartbeat|Connection", re.IGNORECASE)
_LOST = (
    "ProcessError: another process of this run has ended: its own output says why. Run the same"
    " command on all hosts again to go on."
)


def _end(message: str) -> NoReturn:
    """Prints what went wrong and ends this process with 1."""
    if not several():
        print(message, file=sys.stderr)
        sys.exit(1)
    print(f"process {jax.process_index()}: {message}", file=sys.stderr)
    if is_first():
        time.sleep(_LAST_WORDS_SECONDS)  # the others, who may say the same, lose sight of it then
    _leave(1)


def _leave(status: int) -> NoReturn:
    """Ends the process without the end of the interpreter, which would wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a pipe whose reader is gone
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Says that a run was interrupted, and ends the process with status 130.

    XLA compiles in threads of its own, which go on when Ctrl-C takes Python out of the call. The
    end of the interpreter would free the devices under them, and they would crash: so the process
    ends without it, when all that a job holds open has been closed on the way here.
    """
    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends already
        message = str(error) or "Interrupted. Run the same command again to go on."
        print(message, file=sys.stderr)
        if isinstance(error, InterruptedRunError) and several():
            jax.distributed.shutdown()  # as all of them stopped at this step
        _leave(_INTERRUPTED_STATUS)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a configuration's own errors end in one line, as a bad flag does."""
    problem = _misnamed(argv[1:])
    if not problem:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            problem = _bad_flag(str(error))
        except Exception as error:  # a file that is no configuration may raise anything
            problem = _told(error)
    print(
        f"FATAL Flags parsing error: {problem}\nconfigs/base.py lists the configuration's keys;"
        " --helpfull explains the flags.",
        file=sys.stderr,
    )
    sys.exit(1)


def _misnamed(arguments: list[str]) -> str:
    """What is wrong with the file of --config or the name of a key; "" for nothing."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if named := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            path = (following if named[1] is None else named[1]).partition(":")[0]
            if not os.path.isfile(path):
                return (
                    f"--config: there is no file {path!r}. Give a Python file with a function"
                    " get_config, such as configs/digits_resnet8.py."
                )
        key = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if key and not any(k == key[1] or k.startswith(f"{key[1]}.") for k in SCHEMA):
            return f"no such configuration key: {key[1]}{near(key[1])}"
    return ""


def _bad_flag(message: str) -> str:
    """What absl says of a flag, in one line, and what the key expects."""
    problem = message.strip().splitlines()[-1]  # ml_collections puts a traceback before it
    problem = re.sub(
        ": Error while parsing string: .*",
        ": no value as Python writes it (a bracket or a quote that is not closed?)",
        problem,
    )
    if (flag := re.search(r"--config\.([\w.]+)", problem)) and flag[1] in SCHEMA:
        kind = SCHEMA[flag[1]]
        problem += f"; expected {kind.expected}, such as {kind.example!r}"
    return problem


def _told(error: Exception) -> str:
    """What is wrong with a configuration, and in which line of its file."""
    if isinstance(error, SyntaxError):
        return f"{error.filename} is no configuration: {error.msg} in line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and f.filename != __file__]
    if own:
        return f"{type(error).__name__}: {error} in {own[-1].filename}, line {own[-1].lineno}"
    if "get_config" in str(error):
        return f"the file of --config is no configuration: {error}"
    return f"no such configuration key, or no value for it: {error}"


def load_config(flag: flags.FlagHolder) -> ml_collections.ConfigDict:
    """The configuration of `--config`. Raises ConfigError if the file gives none."""
    config = flag.value
    try:
        getattr(config, "items", None)  # of a file that cannot be read every attribute raises
    except OSError as error:
        raise ConfigError(f"--config cannot be loaded: {error.__cause__ or error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"get_config of --config returns {config!r}; expected a ConfigDict, as that of"
            " configs/base.py."
        )
    return config.copy_and_resolve_references()


def given_workdir(path: str) -> Path:
    """The folder of `--workdir`, a ~ at its start being the home folder, as in a shell.

    Raises:
      WorkdirError: it is empty, there is no such home folder, or nothing is known of a URI.
    """
    if not path.strip():
        raise WorkdirError(
            "workdir is empty (an unset variable?): give --workdir a folder, such as runs/search."
        )
    try:
        return as_path(path if in_bucket(path) else Path(path).expanduser())
    except RuntimeError as error:
        raise WorkdirError(f"workdir {path}: {error} Give another --workdir.") from error


def start(
    job: Callable[[ml_collections.ConfigDict, Path], Any],
    config: ml_collections.ConfigDict,
    workdir: str,
    check: Check = check,
    record: Record = start_record,
) -> None:
    """Runs `job(config, workdir)`, if all of the configuration is as it has to be."""
    folder = given_workdir(workdir)
    check(config)
    if several():
        own = identity_of(config.to_dict(), HOW_READ)
        check_agreed({"job": started_module(), "--workdir": workdir, **own}, "what to run")
    if is_first():
        print(record(config), file=sys.stderr)
        job(with_homes(config), folder)
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        job(with_homes(config), folder)


def run_job(
    job: Callable[[ml_collections.ConfigDict, Path], None],
    check: Check = check,
    record: Record = start_record,
) -> None:
    """Parses `--config`, `--config.key=value` and `--workdir`, and runs `job(config, workdir)`.

    `check(config)` comes before all else, and then what `record(config)` tells is printed. Ctrl-C
    ends it with a message from here on.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as `experiments` left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file; FILE.py:quick is its short form. --config.key=value changes a value;"
        " configs/base.py explains the keys.",
    )
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of the run; made if needed. The same command goes on where it was."
    )
    flags.mark_flags_as_required(["config", "workdir"])
    coordinator = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT on which process 0 of a run of several listens."
    )
    processes = flags.DEFINE_integer(
        "processes", None, "How many processes run this command; 1: this one alone."
    )
    process = flags.DEFINE_integer("process", None, "The number of this one of them, from 0.")
    wait_seconds = flags.DEFINE_integer(
        "wait_seconds", WAIT_SECONDS, "How long to wait for the other processes.", lower_bound=1
    )

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
        keep_freed_memory()
        with named_errors():
            connect(coordinator.value, processes.value, process.value, wait_seconds.value)
            start(job, load_config(config), workdir.value, check, record)

    with ended_by_signals():
        app.run(main, flags_parser=parse_flags)
