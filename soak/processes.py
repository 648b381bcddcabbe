"""Find, measure and kill what Dagster started: run workers, and the steps in which drains live."""

import os
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

Kind = Literal["daemon", "code server", "run", "drain", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One process at one moment."""

    pid: int
    kind: Kind
    resident: int
    """Bytes of memory."""
    handles: int
    """Open files and sockets."""
    connected_to: Collection[int]
    """Ports at the other end of its connections; only of drains."""


def seen_in(groups: Mapping[int, Kind]) -> Sequence[Seen]:
    """Return the processes of some process groups; the kind of a group is that of its first process."""
    return [seen for process in _members(groups) if (seen := _look(process, groups)) is not None]


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal; return whether there was anybody to take it."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def kill_group(group: int) -> None:
    """Kill all of a process group at once, as if its machine had died."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def command_of(guard: int) -> int | None:
    """Return the process that a guard of `demo.guard` watches over, leader of its group; None before and after."""
    with suppress(psutil.NoSuchProcess):
        for command in psutil.Process(guard).children():
            return int(command.pid)
    return None


def _members(groups: Collection[int]) -> Iterator[psutil.Process]:
    # By group and not by descent: what outlives its parent has lost its place in the tree.
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) in groups:
                yield process


def _look(process: psutil.Process, groups: Mapping[int, Kind]) -> Seen | None:
    try:
        with process.oneshot():
            kind = groups.get(process.pid) or _kind(process)
            connections = process.net_connections("tcp4") if kind == "drain" else []
            return Seen(
                pid=process.pid,
                kind=kind,
                resident=process.memory_info().rss,
                handles=process.num_fds(),
                connected_to={connection.raddr.port for connection in connections if connection.raddr},
            )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _kind(process: psutil.Process) -> Kind:
    command = " ".join(process.cmdline())
    if "multiprocessing.spawn" in command:
        return "run"
    if "multiprocessing.forkserver" in command:
        # Dagster's steps are forked off a server that the run worker spawned, and keep the server's command line.
        parent = process.parent()
        of_run = parent is not None and "multiprocessing.spawn" in " ".join(parent.cmdline())
        return "other" if of_run else "drain"
    return "code server" if "dagster" in command and " grpc " in command else "other"
