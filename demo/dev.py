"""The demo's world left up: Dagster's UI and daemon, the sensors running, and a trickle of changes."""

import random
import time

from rich.console import Console

from demo import changes, ledger_counts
from demo.processes import ROOT, ProgramFailed, free_port
from demo.world import FOLDER, World, set_up

UI_PORT = 3000
CHANGES_PER_SECOND = 3.0


def stay_up(console: Console) -> int:
    """Bring everything up and keep it up until Ctrl-C; raises ProgramFailed if a part of it ends."""
    if free_port(UI_PORT) != UI_PORT:
        raise ProgramFailed(
            f"The Dagster UI needs port {UI_PORT}, and another program listens there: stop it first "
            f"(`lsof -i :{UI_PORT}` names it)."
        )
    with set_up(lambda step: console.print(f"[bold]·[/] {step}")) as world:
        console.print("[bold]·[/] Starting the Dagster UI and daemon")
        workspace = ["-w", str(ROOT / "workspace.yaml")]
        ui = world.programs.start(
            "dagster_ui",
            ["-m", "dagster_webserver", "-h", "127.0.0.1", "-p", str(UI_PORT), *workspace],
            env=world.env,
        )
        world.programs.start("dagster_daemon", ["-m", "dagster._daemon", "run", *workspace], env=world.env)
        ui.wait_until_it_answers(f"http://127.0.0.1:{UI_PORT}/server_info", seconds=120)
        _tell(console, world)
        _trickle(console, world)
    return 0


def _tell(console: Console, world: World) -> None:
    console.print()
    console.print(
        f"Dagster UI        http://localhost:{UI_PORT}  (Runs; Automation: change_sensor; Catalog: what was delivered)"
    )
    for target, url in world.apis.base_urls.items():
        page = {"flight_board": "/board", "registry": "/v1/", "event_hook": "/summary"}[target]
        console.print(f"{target:<17} {url}{page}")
    console.print(f"source database   {world.database_url}")
    console.print(f"configuration     {FOLDER / 'config'}  (a copy of resources/ with the addresses filled in)")
    console.print(f"logs              {FOLDER}")
    console.print()
    console.print("The first load comes with the sensor's first tick; Ctrl-C stops everything.")


def _trickle(console: Console, world: World) -> None:
    with world.connect() as source, world.connect() as watcher:
        rng = random.Random()
        last = [time.monotonic()]

        def sleep(seconds: float) -> None:
            time.sleep(seconds)
            world.programs.raise_if_any_ended()
            if time.monotonic() - last[0] >= 10:
                last[0] = time.monotonic()
                done, captured = ledger_counts.progress(watcher), ledger_counts.captured(watcher)
                owed = ", ".join(
                    f"{target} is owed {captured - done.get(target, 0):,}" for target in world.apis.base_urls
                )
                console.print(f"{captured:,} changes; {owed}")

        changes.trickle(source, per_second=CHANGES_PER_SECOND, rng=rng, sleep=sleep)
