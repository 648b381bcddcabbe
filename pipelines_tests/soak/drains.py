"""`python -m pipelines_tests.soak.drains`: what daemon, sensor and runs come to, without the seconds that they take."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

from pipelines.delivery.catalog import TargetCatalog
from pipelines.delivery.choosing import choose_targets
from pipelines.delivery.drain import DrainLimits, drain
from pipelines.delivery.ledger import Ledger
from resources.postgres_ledger import PostgresLedger
from resources.system_clock import SystemClock
from resources.target_files import FileTargetCatalog


def deliver(target: str, catalog: TargetCatalog, ledger: Ledger, stop: threading.Event) -> None:
    """Drain *target* whenever the sensor would have it drained, until *stop*."""
    destination = catalog.destination(target)
    while not stop.wait(0.1):
        if target not in choose_targets(catalog.owed(ledger)).targets:
            continue
        with ledger.open_target(target, run_id="soak") as opened:
            assert opened is not None
            drain(
                policy=destination.policy,
                routes=destination.routes,
                ledger=opened,
                connect=destination.connect,
                clock=SystemClock(),
                limits=DrainLimits(linger_seconds=1.0, poll_seconds=0.1),
                stop=stop,
            )


def main() -> None:
    """Deliver to every target until asked to stop."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    catalog, ledger = FileTargetCatalog.load(), PostgresLedger(os.environ["DATABASE_URL"])
    catalog.owed(ledger)  # makes them known
    with ThreadPoolExecutor(len(catalog.configs())) as threads:
        running = [threads.submit(deliver, target, catalog, ledger, stop) for target in catalog.configs()]
        while not stop.wait(0.1) and not any(thread.done() for thread in running):
            pass
        stop.set()
        for thread in running:
            thread.result()


if __name__ == "__main__":
    main()
