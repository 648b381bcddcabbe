"""What others make of the same work. `python -m benchmarks.peers` measures ours and theirs, one after the other.

Every sender reads the same change log from the same Postgres and delivers it to the same receiver, which examines what
came. The peers lie beside this file, one each, with what they need in requirements.txt.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.peers import faults, roster, speed
from benchmarks.peers.running import Sender, senders
from benchmarks.throughput import FOLDER, Measured, NotDelivered, as_json, measure_job
from benchmarks.workload import Workload
from demo.processes import ProgramFailed
from soak.deployment import server


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the numbers; returns 0."""
    modules = [peer.module for peer in roster.PEERS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--changes", type=int, default=Workload().changes)
    parser.add_argument("--rounds", type=int, default=1, help="in turns; the fastest of each counts, for everybody")
    parser.add_argument("--only", nargs="+", default=modules, choices=modules, metavar="PEER", help=", ".join(modules))
    parser.add_argument("--parts", nargs="+", default=["speed", "faults"], choices=["speed", "faults"])
    parser.add_argument("--json", type=Path, default=FOLDER / "peers.json", help="where the numbers go")
    chosen = parser.parse_args(arguments)
    peers = [peer for peer in roster.PEERS if peer.module in chosen.only]
    missing = dict(roster.environment(peers))
    for module, reason in missing.items():
        print(f"{module} is left out: {reason}")
    peers = [peer for peer in peers if peer.module not in missing]
    works = [
        Workload(changes=chosen.changes, targets=targets, latency=latency)
        for targets, latency in ((2, 0.0), (2, 0.05), (8, 0.05))
    ]
    rows: Sequence[Sequence[Measured]] = []
    outcomes: list[faults.Outcome] = []
    with server() as server_url:
        if "speed" in chosen.parts:
            rows = _in_turns(chosen.rounds, senders(peers), server_url, works, missing)
            # What stands beside the plain Dagster asset: a run, from the command to its end.
            rows = [*rows, [measure_job(server_url, work, folder=FOLDER / "peers") for work in works]]
        once = [
            sender for sender in senders(peers) if sender.peer is None or sender.per_target == sender.peer.layouts[0]
        ]
        for sender in once if "faults" in chosen.parts else ():
            for trial in faults.TRIALS:
                found = faults.put_to(sender, trial, server_url, faults.WORK, folder=FOLDER / "peers")
                print(f"{sender.name}, {trial.name}: {found}", flush=True)
                outcomes.append(found)
    if rows:
        print(speed.table(rows))
    if outcomes:
        print(faults.table(outcomes))
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    numbers = {
        "speed": [as_json(one) for row in rows for one in row],
        "faults": [asdict(one) for one in outcomes],
        "left_out": missing,
    }
    chosen.json.write_text(json.dumps(numbers, indent=1))
    print(f"Every number is in {chosen.json}.")
    return 0


def _in_turns(
    rounds: int, all_senders: Sequence[Sender], server_url: str, works: Sequence[Workload], missing: dict[str, str]
) -> list[list[Measured]]:
    """Return each sender's fastest round of each of *works*; who cannot deliver is noted as *missing*.

    Round by round, all one after the other: a machine is not as fast in one minute as in the next.
    """
    found: dict[str, list[list[Measured]]] = {sender.name: [[] for _ in works] for sender in all_senders}
    for number, _ in enumerate(works):
        for sender in [*all_senders] * rounds:
            if sender.name in missing:
                continue
            try:
                one = speed.measure(sender, server_url, works[number], folder=FOLDER / "peers")
            except (NotDelivered, ProgramFailed) as problem:
                missing[sender.name] = str(problem)
                print(f"{sender.name} is left out: {problem}", flush=True)
                continue
            print(f"{sender.name}: {_told(one)}", flush=True)
            found[sender.name][number].append(one)
    return [
        [min(some, key=lambda one: one.seconds) for some in of_each]
        for name, of_each in found.items()
        if name not in missing
    ]


def _told(one: Measured) -> str:
    work = one.workload
    return f"{work.targets} targets, {work.latency * 1000:g} ms: {one.per_second:,.0f} records/s"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ProgramFailed, NotDelivered) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is left running.")
