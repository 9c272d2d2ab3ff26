"""How a command ends: by Ctrl-C, by a file or a key that is not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import command_line

ROOT = Path(__file__).parent.parent


def ended(code):
    """(exit status, standard error) of a Python program."""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, text=True, capture_output=True,
        timeout=300,
    )  # fmt: skip
    return found.returncode, found.stderr


COMPILING = """
import os, signal, threading
import jax, jax.numpy as jnp
from experiments.command_line import ended_by_signals

def deep(x):
    for k in range(400):
        x = jnp.tanh(x @ x + k)
    return x

lowered = jax.jit(deep).lower(jnp.ones((8, 8)))
with ended_by_signals():
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    lowered.compile()
"""


def test_an_interrupt_while_xla_compiles_is_no_crash():
    """Its threads go on, and with the interpreter they would lose the devices that they use."""
    code, err = ended(COMPILING)
    assert (code, err) == (130, "Interrupted. Run the same command again to go on.\n")


@pytest.mark.parametrize("name, code", [("-m", -signal.SIGINT), ("my_program.py", 7)])
def test_an_interrupt_while_a_command_imports_ends_it_quietly(name, code):
    """And not a program that imports the package, which has its own handler."""
    found, err = ended(
        f"import os, signal, sys; sys.argv = [{name!r}]\n"
        "try:\n"
        "    import experiments\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(7)\n"
    )
    assert (found, err) == (code, "")


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config=nope.py", ["no file 'nope.py'", "configs/digits_resnet8.py"]),
        ("--config=", ["no file ''", "configs/digits_resnet8.py"]),
        ("--config.formats=(('.*', 'int4'", ["config.formats", "not closed", "such as (("]),
        ("--config.palette.rules=((\".*', 2),)", ["palette.rules", "not closed", "such as (("]),
        ("--config.search.sercher=critic", ["key: search.sercher", "mean search.searcher"]),
        ("--noconfig.data.flop", ["key: data.flop", "mean data.flip"]),
        ("--config.zzz=1", ["no such configuration key: zzz"]),
    ],
)
def test_a_command_line_is_refused_in_two_lines(argument, words):
    run = "from experiments import command_line; command_line.run_job(lambda *_: None)"
    given = ["x", "--config=configs/digits_resnet8.py", "--workdir=/nowhere/a", argument]
    code, err = ended(f"import sys; sys.argv = {given!r}; {run}")
    assert code == 1
    assert all(word in err for word in words), err
    assert len(err.splitlines()) == 2
    assert len(err.splitlines()[0]) < 260


def test_an_interrupt_is_told_once_with_what_to_do(capsys, monkeypatch):
    codes = []
    monkeypatch.setattr(command_line.os, "_exit", codes.append)
    before = signal.getsignal(signal.SIGINT)
    try:
        for error in (KeyboardInterrupt(), command_line.InterruptedRunError("SIGTERM: saved.")):
            with command_line.ended_by_signals():
                raise error
    finally:
        signal.signal(signal.SIGINT, before)
    assert codes == [130, 130]
    assert capsys.readouterr().err.splitlines() == [
        "Interrupted. Run the same command again to go on.", "SIGTERM: saved.",
    ]  # fmt: skip
