"""`python -m demo`: deliver a real data set and real changes to real APIs, read them back, and compare.

`python -m demo dev`: the same world, left up under the Dagster UI with a trickle of changes, until Ctrl-C.
"""

import argparse
import io
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import httpx
from rich.console import Console

from demo import dev, run
from demo.dataset import DataSetMissing
from demo.processes import ProgramFailed
from demo.target_apis import ConfigurationChanged
from demo.world import AlreadyRunning
from resources.embedded_postgres import EmbeddedPostgresFailed

REFUSALS = (
    AlreadyRunning,
    ConfigurationChanged,
    DataSetMissing,
    EmbeddedPostgresFailed,
    ProgramFailed,
    httpx.HTTPError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo or leave it up; returns 0 only if every target agrees with the source."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="Watch the pipeline deliver.")
    parser.add_argument("what", nargs="?", choices=["run", "dev"], default="run", help="run to the end, or stay up")
    what = parser.parse_args(arguments).what

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets question marks, not an exception
    # Where output is not a terminal, its width is a guess; the table needs some.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return run.run(console) if what == "run" else dev.stay_up(console)
    except REFUSALS as problem:
        console.print(str(problem), style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped; nothing is left running.")
        return 0 if what == "dev" else 130  # Ctrl-C is how `dev` ends


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
