"""Imported by the process that a run's steps are forked from, and by nothing else: makes once what each step would.

Building the definitions was two thirds of what a step cost, and more with every target. Where that fails nothing is
kept: each step then fails at it itself, and says so where people look.
"""

import gc
from contextlib import suppress

from pipelines import definitions

with suppress(Exception):
    definitions.keep()
gc.collect()
gc.freeze()  # looked through by a step, all of this would be copied for it
