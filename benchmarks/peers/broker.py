"""A Redis of our own, for as long as it is needed."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.roster import REDIS
from demo.processes import ROOT, ProgramFailed, free_port

_PATIENCE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """A Redis that is up."""

    url: str
    pid: int
    """Of the process that has it as its child."""


@contextmanager
def redis(folder: Path) -> Iterator[Broker]:
    """Yield a Redis that writes what it is told to *folder* every second, until the context ends."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port(0)
    lasting = ["--dir", str(folder), "--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
    command = [REDIS, "--port", str(port), "--bind", "127.0.0.1", *lasting]
    with (folder / "redis.log").open("wb") as log:
        guard = subprocess.Popen(
            [sys.executable, "-m", "demo.guard", str(_PATIENCE), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(port, guard)
        yield Broker(url=f"redis://127.0.0.1:{port}/0", pid=guard.pid)
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait(2 * _PATIENCE)


def _wait_until_it_answers(port: int, guard: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and guard.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            if connection.recv(16) == b"+PONG\r\n":
                return
        time.sleep(0.05)
    raise ProgramFailed(f"{REDIS} did not come up on port {port}")
