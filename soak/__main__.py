"""`python -m soak --seconds 600`: what is lost, repeated or out of order while everything fails now and then?"""

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import httpx

from demo.processes import ProgramFailed
from resources.embedded_postgres import EmbeddedPostgresFailed
from soak.run import Options, soak
from soak.schedule import OutageTooLong


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak; returns 0 only if every target agrees with the source and nothing was lost or out of order."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    default = Options()
    parser.add_argument("--seconds", type=float, default=default.seconds, help="how long to write and to misbehave")
    parser.add_argument("--patience", type=float, default=default.patience, help="seconds to catch up in after that")
    parser.add_argument("--per-second", type=float, default=default.per_second, help="the source's transactions")
    parser.add_argument("--outage", type=float, help="seconds for which one target is down; by default a fifth of all")
    parser.add_argument("--seed", type=int, default=default.seed)
    chosen = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in what a shell starts in the background
        signal.signal(number, _stop)
    try:
        return soak(Options(**vars(chosen)), lambda line: print(line, flush=True))
    except (OutageTooLong, ProgramFailed, EmbeddedPostgresFailed, httpx.HTTPError) as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; nothing is left running.")
        return 130


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
