"""Run a command, and end it when whoever started it is gone, however that came about.

`python -m demo.guard SECONDS COMMAND …` with a pipe for standard input. When the pipe closes, because its owner closed
it or was killed, the command and everything that it started gets SIGTERM, and SIGKILL after SECONDS.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress


def main() -> int:
    """Run the command; returns its exit code."""
    patience = float(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):
        # Ignored signals are inherited, and a shell ignores SIGINT for what it starts in the background: the command is
        # to hear SIGTERM whoever started us, and Dagster makes of SIGTERM whatever SIGINT is.
        signal.signal(number, signal.SIG_DFL)
    command = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_owner, args=(command.pid, patience), daemon=True).start()
    code = command.wait()
    _signal_group(command.pid, signal.SIGKILL)  # what it started and left behind
    return code if code >= 0 else 128 - code


def _end_with_owner(group: int, patience: float) -> None:
    while os.read(0, 1024):  # not sys.stdin: a thread that waits in it fails the interpreter's end
        pass
    _signal_group(group, signal.SIGTERM)
    timer = threading.Timer(patience, _signal_group, (group, signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
