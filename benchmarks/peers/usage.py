"""What processes use of CPU and memory, looked at from outside."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

_SAMPLE_SECONDS = 0.25


class Usage:
    """CPU seconds and memory of some processes and of all that they started, the ended ones too."""

    def __init__(self) -> None:
        self.cpu_seconds = 0.0
        self.peak_bytes = 0
        """Resident at once, added up over all processes."""

    @contextmanager
    def watching(self, pids: Sequence[int]) -> Iterator[None]:
        """Count what is used until the context ends; the processes still have to be there then."""
        roots, over = [psutil.Process(pid) for pid in pids], threading.Event()
        before = _cpu_seconds(roots)

        def sample() -> None:
            while not over.wait(_SAMPLE_SECONDS):
                self.peak_bytes = max(self.peak_bytes, _resident_bytes(roots))

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            over.set()
            sampler.join()
            self.cpu_seconds = _cpu_seconds(roots) - before
            self.peak_bytes = max(self.peak_bytes, _resident_bytes(roots))


def _tree(roots: Sequence[psutil.Process]) -> Iterator[psutil.Process]:
    for root in roots:
        with suppress(psutil.Error):
            yield from [root, *root.children(recursive=True)]


def _cpu_seconds(roots: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in _tree(roots):
        with suppress(psutil.Error):  # it ended while we looked: its parent has its time
            used = process.cpu_times()
            total += used.user + used.system + used.children_user + used.children_system
    return total


def _resident_bytes(roots: Sequence[psutil.Process]) -> int:
    total = 0
    for process in _tree(roots):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total
