"""Start the programs of the demo, and see that none outlives it."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0
"""Seconds that a program has to end by itself once asked to."""


class ProgramFailed(Exception):
    """A program of the demo ended or did not get ready; the message says where its output is, and its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One running program, under its guard."""

    name: str
    guard: subprocess.Popen[bytes]
    log: Path

    def exit_code(self) -> int | None:
        """Return how it ended, or None while it runs."""
        return self.guard.poll()

    def stop(self) -> None:
        """End it and everything that it started; returns when all of it is gone."""
        if self.guard.stdin is not None and not self.guard.stdin.closed:
            self.guard.stdin.close()
        try:
            self.guard.wait(PATIENCE + 5)
        except subprocess.TimeoutExpired:
            self.guard.kill()
            self.guard.wait()

    def wait_until_it_answers(self, url: str, *, seconds: float) -> None:
        """Return once GET *url* is answered with 2xx; raises ProgramFailed if that takes more than *seconds*."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.exit_code() is not None:
                raise ProgramFailed(f"{self.name} ended before it answered at {url}. {self.last_words()}")
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise ProgramFailed(f"{self.name} did not answer at {url} within {seconds:.0f} s. {self.last_words()}")

    def last_words(self, lines: int = 15) -> str:
        """Return where its output is, and the last *lines* of it."""
        text = self.log.read_text(errors="replace").rstrip().splitlines()
        return f"The end of its output, {self.log}:\n" + "\n".join("    " + line for line in text[-lines:])


class Programs:
    """The programs that were started; leaving the `with` block stops them, the last started first."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started: list[Program] = []

    def start(self, name: str, arguments: Sequence[str], *, env: Mapping[str, str]) -> Program:
        """Start Python with *arguments*, its output going to `<name>.log`; *env* is added to the environment."""
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            guard = subprocess.Popen(
                [sys.executable, "-m", "demo.guard", str(PATIENCE), sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | env,
                cwd=ROOT,
                # Ctrl-C in the terminal is for the demo alone, which then stops these in order.
                start_new_session=True,
            )
        program = Program(name=name, guard=guard, log=log)
        self._started.append(program)
        return program

    def raise_if_any_ended(self) -> None:
        """Raise ProgramFailed if one that was to stay up has ended."""
        for program in self._started:
            if program.exit_code() is not None:
                raise ProgramFailed(
                    f"{program.name} ended with exit code {program.exit_code()}. {program.last_words()}"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._started:
            self._started.pop().stop()


def free_port(preferred: int) -> int:
    """Return *preferred* if nothing listens there, or else any port that is free on 127.0.0.1."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            # As the servers do: a port whose last connections are still being closed counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ProgramFailed("There is no free port on 127.0.0.1.")
