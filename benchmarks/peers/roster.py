"""Who is measured, in which environment, and why somebody is not."""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.processes import ROOT

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
ENVIRONMENT = ROOT / ".data" / "peers" / "venv"
REDIS = "redis-server"
_COMMON = ("psycopg[binary]", "msgspec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One peer: a module of this package."""

    name: str
    module: str
    """Without the package."""
    needs: Sequence[str]
    """Packages named in requirements.txt."""
    programs: Sequence[str] = ()
    """What must be on the PATH besides."""
    layouts: Sequence[bool] = (False,)
    """Whether each target has a process of its own: each way is measured."""


PEERS: Sequence[Peer] = (
    Peer(name="httpx, threads", module="httpx_threads", needs=["httpx"], layouts=(False, True)),
    Peer(name="httpx over aiohttp", module="httpx_over_aiohttp", needs=["httpx", "httpx-aiohttp"]),
    Peer(name="asyncio + aiohttp", module="aiohttp_script", needs=["aiohttp"], layouts=(False, True)),
    Peer(name="asyncio, to the bone", module="tuned_asyncio", needs=["uvloop"], layouts=(False, True)),
    Peer(name="a plain Dagster asset, httpx", module="dagster_asset", needs=["httpx", "dagster"]),
    Peer(name="Celery, Redis, httpx", module="celery_tasks", needs=["httpx", "celery", "redis"], programs=[REDIS]),
    Peer(name="dlt, custom destination", module="dlt_destination", needs=["httpx", "dlt"], layouts=(True,)),
    Peer(name="drt-core", module="drt_sync", needs=["drt-core[postgres]"]),
)


def environment(peers: Sequence[Peer], folder: Path = ENVIRONMENT) -> Mapping[str, str]:
    """Make the peers' environment where there is none; return, by module, why a peer cannot be measured."""
    missing = {
        peer.module: f"{program} is not installed"
        for peer in peers
        for program in peer.programs
        if shutil.which(program) is None
    }
    if len(missing) < len(peers) and not python_of(folder).exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for peer in peers:
        if peer.module not in missing and (reason := _install([*_COMMON, *peer.needs], folder)):
            missing[peer.module] = reason
    return missing


def python_of(folder: Path = ENVIRONMENT) -> Path:
    """Return the environment's interpreter."""
    return folder / "bin" / "python"


def pins(text: str) -> Mapping[str, str]:
    """Return the lines of a requirements file by what they pin."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {re.split("[=<>~!]", line, maxsplit=1)[0]: line for line in lines}


def _install(names: Sequence[str], folder: Path) -> str | None:
    """Install what is named, as it is pinned; return why that failed. What was installed so before is left as it is."""
    pinned = pins(REQUIREMENTS.read_text())
    wanted = [pinned[name] for name in names]
    stamp = folder / f"installed-{hashlib.sha256(' '.join(wanted).encode()).hexdigest()[:16]}"
    if stamp.exists():
        return None
    print(f"Installing {', '.join(wanted)} …", flush=True)
    quiet = ["--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [str(python_of(folder)), "-m", "pip", "install", *quiet, *wanted], capture_output=True, text=True
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return f"it does not install: {said[-1] if said else done.stderr.strip()[-200:]}"
    stamp.touch()
    return None
