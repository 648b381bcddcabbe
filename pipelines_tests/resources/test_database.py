"""Which database: the environment's if it names one, else the embedded; and what people read when it cannot be had."""

import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

from resources import embedded_postgres
from resources.database import (
    DagsterDatabaseMissing,
    DatabaseProblem,
    DatabaseUnreachable,
    MalformedDatabaseUrl,
    ServerTooOld,
    check_server,
    connect,
    dagster_postgres_url,
    database_url,
    main,
    refuse_old_server,
)

SECRET = "hunter2"


def database_of(url: str) -> str:
    with connect(url, application_name="test") as connection:
        return connection.info.dbname


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2", "postgresql+psycopg"])
def test_the_environment_names_the_database_in_any_usual_spelling(scheme, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", f"{scheme}://me:pw@db.example:6432/shop?sslmode=require")

    assert database_url() == "postgresql://me:pw@db.example:6432/shop?sslmode=require"


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2"])
def test_dagster_is_told_to_use_psycopg2_whatever_the_spelling(scheme, monkeypatch):
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", f"{scheme}://me:pw@db.example/dagster")

    assert dagster_postgres_url() == "postgresql+psycopg2://me:pw@db.example/dagster"


def test_dagsters_database_is_not_guessed_from_the_other(monkeypatch):
    """Dagster would fill a production database with tables of its own."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://db.example/shop")

    with pytest.raises(DagsterDatabaseMissing, match="DATABASE_URL is set but DAGSTER_POSTGRES_URL is not: set it"):
        dagster_postgres_url()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (f"shop:{SECRET}", "DATABASE_URL is not a URL"),
        (f"mysql://me:{SECRET}@db.example/shop", "DATABASE_URL names a 'mysql' database, only Postgres will do"),
        (f"postgresql://me:{SECRET}@{SECRET}@db.example/shop", "cannot be read as a URL"),
        (f"postgresql://me:4/{SECRET}@db.example/shop", "cannot be read as a URL"),
        (f"postgresql://me:{SECRET}/4@db.example/shop", "cannot be read as a URL"),
        (f"postgresql://me:%z{SECRET}@db.example/shop", "cannot be read as a URL"),
        (f"postgresql://me:{SECRET}@db.example:{SECRET}/shop", "cannot be read as a URL"),
        (f"postgresql://me@db.example/shop?passwrod={SECRET}", "cannot be read as a URL"),
    ],
)
def test_a_malformed_url_is_one_sentence_without_the_password(value, told, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", value)

    with pytest.raises(MalformedDatabaseUrl) as raised:
        database_url()
    assert told in str(raised.value)
    assert "postgresql://user:password@host:5432/database" in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_is_an_unset_one(value, postgres_url, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", value)

    assert database_of(database_url()) == "distributary"


def test_with_nothing_named_both_databases_are_the_embedded_servers(postgres_url):
    assert database_of(database_url()) == "distributary"
    engine = sqlalchemy.create_engine(dagster_postgres_url())
    with engine.connect() as connection:
        assert connection.dialect.driver == "psycopg2"
        assert connection.scalar(sqlalchemy.text("select current_database()")) == "dagster"
    engine.dispose()


def test_the_embedded_database_is_made_once_whoever_asks(postgres_url):
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute("drop database if exists distributary with (force)")

    with ThreadPoolExecutor(8) as askers:
        urls = set(askers.map(lambda _: database_url(), range(8)))

    assert {database_of(url) for url in urls} == {"distributary"}


def test_an_exported_url_of_the_embedded_server_starts_it_again(postgres_url, tests_own_server, monkeypatch):
    """What `env` printed stays in people's shells, across stops and kills of the server."""
    folder = tests_own_server.with_name(f"{tests_own_server.name}-exported")
    monkeypatch.setenv("DISTRIBUTARY_POSTGRES_DIR", str(folder))
    try:
        monkeypatch.setenv("DATABASE_URL", database_url())
        embedded_postgres.stop()

        assert database_of(database_url()) == "distributary"
    finally:
        embedded_postgres.remove(folder)


def test_an_embedded_server_that_cannot_start_is_an_unreachable_database(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTRIBUTARY_POSTGRES_DIR", str(tmp_path / "file"))

    with pytest.raises(DatabaseUnreachable, match="is not a folder: name another in DISTRIBUTARY_POSTGRES_DIR"):
        database_url()


def test_a_refused_connection_names_the_place_and_what_to_check():
    with pytest.raises(DatabaseUnreachable) as raised:
        connect(f"postgresql://me:{SECRET}@127.0.0.1:1/shop", application_name="test")

    assert str(raised.value) == (
        "Cannot reach the database 'shop' at 127.0.0.1:1 as user 'me': Connection refused;"
        " check host and port, that the server is up, and that this machine may reach it."
    )


def test_a_missing_socket_says_how_to_start_the_embedded_server(tmp_path):
    with pytest.raises(DatabaseUnreachable, match=r"No such file or directory; start the server \(the embedded one:"):
        connect(f"postgresql://me@/shop?host={tmp_path}", application_name="test")


def test_a_missing_database_and_a_missing_user_are_named(postgres_url):
    with pytest.raises(DatabaseUnreachable, match='database "nowhere" does not exist; create it, or check the name'):
        connect(postgres_url.replace("/postgres?", "/nowhere?"), application_name="test")
    with pytest.raises(DatabaseUnreachable, match="as user 'nobody_here': role \"nobody_here\" does not exist"):
        connect(postgres_url.replace("postgres@", f"nobody_here:{SECRET}@"), application_name="test")


def test_a_url_that_cannot_be_read_is_an_unreachable_database():
    with pytest.raises(DatabaseUnreachable, match="cannot be read") as raised:
        connect(f"postgresql://me:{SECRET}@db.example:{SECRET}/shop", application_name="test")
    assert SECRET not in str(raised.value)


def test_a_dead_network_is_noticed_within_a_minute_unless_the_url_says_otherwise(postgres_url):
    with connect(f"{postgres_url}&keepalives_idle=7", application_name="drain crm") as connection:
        parameters = connection.info.get_parameters()

    assert parameters["application_name"] == "drain crm"
    assert (parameters["keepalives_idle"], parameters["keepalives_interval"], parameters["keepalives_count"]) == (
        "7",
        "10",
        "3",
    )
    assert (parameters["connect_timeout"], parameters["tcp_user_timeout"]) == ("10", "60000")


def test_a_server_older_than_14_is_refused_in_one_sentence():
    refuse_old_server(140_000)
    with pytest.raises(ServerTooOld, match=r"is PostgreSQL 13, but .* need 14 or newer: upgrade the server"):
        refuse_old_server(130_023)


def test_the_embedded_server_is_new_enough(postgres_url):
    with connect(postgres_url, application_name="test") as connection:
        check_server(connection)


def test_every_problem_can_be_caught_by_one_name():
    for problem in (DagsterDatabaseMissing, DatabaseUnreachable, MalformedDatabaseUrl, ServerTooOld):
        assert issubclass(problem, DatabaseProblem)


def test_env_prints_lines_that_a_shell_can_evaluate(postgres_url, tmp_path, monkeypatch, capsys):
    """Also where a path or a password holds what a shell would otherwise take for its own."""
    project = tmp_path / "a project's folder"
    project.mkdir()
    (project / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    monkeypatch.setattr(embedded_postgres, "project_root", lambda: project)
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:a'b$c;d&e@db.example/shop?sslmode=require&port=5432")
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql://db.example/dagster")

    assert main(["env"]) == 0
    assert main(["env"]) == 0  # and again, with the link there
    lines = capsys.readouterr().out
    script = f'eval {shlex.quote(lines)}\nprintf "%s\\n" "$DATABASE_URL" "$DAGSTER_POSTGRES_URL" "$DAGSTER_HOME"'
    home = project / ".data" / "dagster"

    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout.splitlines() == [
        "postgresql://me:a'b$c;d&e@db.example/shop?sslmode=require&port=5432",
        "postgresql+psycopg2://db.example/dagster",
        str(home),
    ]
    assert (home / "dagster.yaml").read_text() == "telemetry: {enabled: false}\n"


def test_env_leaves_a_dagster_home_of_ones_own_alone(postgres_url, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))

    assert main(["env"]) == 0
    assert f"export DAGSTER_HOME={tmp_path}\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_env_that_fails_stops_the_shell_with_one_sentence(monkeypatch, capsys):
    monkeypatch.setenv("DATABASE_URL", "shop")

    assert main(["env"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "DATABASE_URL is not a URL: write postgresql://user:password@host:5432/database.\n"
    assert subprocess.run(["sh", "-c", f"eval {shlex.quote(printed.out)} && echo went on"]).returncode == 1


def test_each_test_gets_a_fresh_migrated_database(database):
    with connect(database, application_name="test") as connection:
        assert connection.execute("select count(*) from distributary.change_log").fetchone() == (0,)
        connection.execute("insert into distributary.target_state (target) values ('crm')")


def test_and_sees_nothing_of_another_test(database):
    with connect(database, application_name="test") as connection:
        assert connection.execute("select count(*) from distributary.target_state").fetchone() == (0,)
        connection.execute("insert into distributary.target_state (target) values ('crm')")


def test_tests_use_a_server_of_their_own(postgres_url, tests_own_server: Path):
    assert str(tests_own_server) in postgres_url
    assert embedded_postgres.default_folder() == tests_own_server
