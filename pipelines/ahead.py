"""Imported by the definitions before all else: a run's process starts the one that its steps are forked from at once.

Each of the two imports Dagster and all of ours, which takes a second or two. One after the other, a change that finds
no run at work would wait for both.
"""

import multiprocessing
import os
import sys
from contextlib import suppress
from multiprocessing import forkserver

# Forked from a server that has imported everything, Dagster's storage too, and made the definitions: a step starts in a
# fraction of the time that spawning takes. What is missing here, each step imports for itself.
PRELOAD = [
    "dagster._core.executor.multiprocess",
    "dagster_postgres",
    "psycopg2.extras",
    "upath.core",
    "dotenv",
    "pipelines.forked",
]

# Dagster's own launcher makes a run's process by `multiprocessing`. The commands are those of a person, and of the
# launchers that make a container.
_IS_A_RUN = multiprocessing.parent_process() is not None or sys.argv[1:3] in (
    ["job", "execute"],
    ["api", "execute_run"],
)

# What a run's process starts is no run's process, though it may be made in the same way, or have the same arguments (by
# Pythons with python/cpython#143717): without a mark, each would start the next, without end.
_MARK = "DISTRIBUTARY_WITHIN_A_RUN"

if _IS_A_RUN and _MARK not in os.environ:
    os.environ[_MARK] = "1"
    with suppress(OSError):  # Dagster tries again, and says so
        forkserver.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
