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
    parser.add_argument("--rounds", type=int, default=1, help="of each case; the fastest round counts, for everybody")
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
    rows: list[list[Measured]] = []
    outcomes: list[faults.Outcome] = []
    with server() as server_url:
        for sender in senders(peers) if "speed" in chosen.parts else ():
            try:
                rows.append([_fastest(chosen.rounds, sender, server_url, work) for work in works])
            except (NotDelivered, ProgramFailed) as problem:
                missing[sender.name] = str(problem)
                print(f"{sender.name} is left out: {problem}", flush=True)
        if rows:  # what stands beside the plain Dagster asset: a run, from the command to its end
            rows.append([measure_job(server_url, work, folder=FOLDER / "peers") for work in works])
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


def _fastest(rounds: int, sender: Sender, server_url: str, work: Workload) -> Measured:
    found = [speed.measure(sender, server_url, work, folder=FOLDER / "peers") for _ in range(rounds)]
    fastest = min(found, key=lambda one: one.seconds)
    print(f"{sender.name}: {_told(fastest)}", flush=True)
    return fastest


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
