"""Run what delivers: start its processes, tell them to begin, see what they use, kill them if that is wanted."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.roster import Peer, python_of
from benchmarks.peers.script import Work
from benchmarks.peers.usage import Usage
from benchmarks.workload import Workload
from demo.processes import ROOT, ProgramFailed

OURS = "distributary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a delivery happens."""

    workload: Workload
    database_url: str
    url: str
    """The receiver's."""
    folder: Path
    """The sender's own: logs, and what it keeps."""
    timeout: float = 15.0
    """Seconds that an answer may take, for everybody."""
    broker_url: str | None = None
    broker_pids: Sequence[int] = ()
    """The processes that make up the broker, for who counts what they use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Something that delivers, as processes that say `ready`, wait to be told, and say how it ended."""

    name: str
    peer: Peer | None = None
    """None: ours."""
    per_target: bool = True
    """Each target has a process of its own."""
    python: str = sys.executable

    def commands(self, setting: Setting) -> list[list[str]]:
        """Return the processes to start."""
        work = setting.workload
        if self.peer is None:
            files = [work.target_file(name, setting.url) | {"timeout_seconds": setting.timeout} for name in work.names]
            module = "benchmarks.drainer"
            return [[self.python, "-m", module, setting.database_url, json.dumps(one)] for one in files]
        module = f"benchmarks.peers.{self.peer.module}"
        parts = [[name] for name in work.names] if self.per_target else [work.names]
        return [[self.python, "-m", module, json.dumps(asdict(self._work(setting, part)))] for part in parts]

    def _work(self, setting: Setting, targets: Sequence[str]) -> Work:
        return Work(
            database_url=setting.database_url,
            url=setting.url,
            targets=targets,
            batch=setting.workload.batch,
            in_flight=setting.workload.in_flight,
            timeout=setting.timeout,
            folder=str(setting.folder),
            broker_url=setting.broker_url,
        )


def senders(peers: Sequence[Peer], python: str = str(python_of())) -> list[Sender]:
    """Return ours, and each peer in each of its ways."""
    found = [Sender(name=OURS)]
    for peer in peers:
        for per_target in peer.layouts:
            name = f"{peer.name}, a process per target" if per_target and len(peer.layouts) > 1 else peer.name
            found.append(Sender(name=name, peer=peer, per_target=per_target, python=python))
    return found


class Delivery:
    """The processes of one sender at work; leaving the `with` block ends all of them."""

    def __init__(self, sender: Sender, setting: Setting) -> None:
        setting.folder.mkdir(parents=True, exist_ok=True)
        self._name = sender.name
        self._log = setting.folder / "sender.log"
        self._processes: list[subprocess.Popen[str]] = []
        self.usage = Usage()
        self.seconds = 0.0
        with self._log.open("ab") as log:
            for command in sender.commands(setting):
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        cwd=ROOT,
                        start_new_session=True,
                    )
                )

    def deliver(self, limit: float) -> list[dict[str, Any]]:
        """Have all deliver; return what each said. Raises ProgramFailed if one ends, or after *limit* seconds."""
        watchdog = threading.Timer(limit, self.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            for process in self._processes:
                self._line(process)
            with self.usage.watching([process.pid for process in self._processes]):
                started = time.monotonic()
                for process in self._processes:
                    assert process.stdin is not None
                    process.stdin.write("go\n")
                    process.stdin.flush()
                said = [json.loads(self._line(process)) for process in self._processes]
                self.seconds = time.monotonic() - started
            return said
        finally:
            watchdog.cancel()

    def kill(self) -> None:
        """SIGKILL to all processes and to what they started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        if line := process.stdout.readline():
            return line
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        raise ProgramFailed(f"{self._name} ended with exit code {process.returncode}: {last}; see {self._log}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.stdout.close()
        self.kill()
        for process in self._processes:
            process.wait()
