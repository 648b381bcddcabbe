"""Whatever ends the demo ends what it started."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.processes import ROOT, ProgramFailed, Programs, free_port

SLEEP = "import time; print('up', flush=True); time.sleep(60)"


def test_leaving_the_block_stops_what_was_started_in_it(tmp_path: Path) -> None:
    with Programs(tmp_path) as programs:
        program = programs.start("sleeper", ["-c", SLEEP], env={})
        await_text(program.log, "up")
        assert program.exit_code() is None

    assert program.exit_code() == 128 + signal.SIGTERM


def test_a_program_ends_even_if_the_demo_is_killed(tmp_path: Path) -> None:
    """Nothing runs in a process that gets SIGKILL; its guard sees the pipe close."""
    script = (
        "import os, pathlib, sys, time; from demo.processes import Programs\n"
        "Programs(pathlib.Path(sys.argv[1])).start('sleeper', ['-c', sys.argv[2]], env={}); time.sleep(60)"
    )
    tell_pid = f"import os; print(os.getpid(), flush=True); {SLEEP}"
    demo = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), tell_pid], cwd=ROOT)
    pid = int(await_text(tmp_path / "sleeper.log", "up").split()[0])
    assert is_running(pid)

    demo.kill()
    demo.wait()

    await_true(lambda: not is_running(pid))


def test_a_program_that_ends_early_is_named_with_its_last_words(tmp_path: Path) -> None:
    with Programs(tmp_path) as programs:
        program = programs.start("broken", ["-c", "print('no such table')"], env={})
        with pytest.raises(ProgramFailed, match=r"(?s)broken ended before it answered.*no such table"):
            program.wait_until_it_answers("http://127.0.0.1:9/", seconds=20)


def test_another_port_is_found_when_the_preferred_one_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) not in (port, 0)
    assert free_port(port) == port


def await_text(log: Path, text: str) -> str:
    await_true(lambda: log.exists() and text in log.read_text())
    return log.read_text()


def await_true(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
