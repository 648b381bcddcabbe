"""The configured targets as a run sees them: read from files, checked as a whole, made ready one by one."""

import textwrap
from pathlib import Path
from uuid import uuid4

import pytest

from pipelines.delivery.catalog import TargetMisconfigured
from pipelines.delivery.drain import RateLimit
from pipelines.delivery.routing import HttpRequest
from pipelines.delivery.target import Answer
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from resources.config_files import ConfigError
from resources.source_tables import SourceTable
from resources.target_files import FileTargetCatalog

SOURCE = "tables: {people: {key: id, exclude: [password]}}\n"


def write(folder: Path, name: str, text: str) -> None:
    (folder / "targets").mkdir(exist_ok=True)
    (folder / "targets" / f"{name}.yaml").write_text(textwrap.dedent(text))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a configuration folder with the targets crm, which has a secret, and email, which has none."""
    (tmp_path / "source.yaml").write_text(SOURCE)
    write(
        tmp_path,
        "crm",
        """\
        name: crm
        base_url: https://crm.example
        auth: {type: bearer, token: {env: CRM_TOKEN}}
        rate_limit: {requests_per_second: 5}
        routes:
          people: {upsert: {path: /people}, delete: {path: '/people/${_key}'}}
        """,
    )
    write(tmp_path, "email", "name: email\nbase_url: https://email.example\nroutes: {people: {upsert: {path: /}}}\n")
    return tmp_path


def test_targets_come_by_name_and_in_order(folder):
    write(folder, "a_file_named_otherwise", "name: app\nbase_url: http://app\nroutes: {people: {upsert: {path: /}}}\n")

    assert list(FileTargetCatalog.load(folder).configs()) == ["app", "crm", "email"]


def test_the_folder_is_the_environments_unless_one_is_given(folder, monkeypatch, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "source.yaml").write_text(SOURCE)
    monkeypatch.setenv("DISTRIBUTARY_CONFIG", str(folder))

    assert list(FileTargetCatalog.load().configs()) == ["crm", "email"]
    assert list(FileTargetCatalog.load(other).configs()) == []


def test_a_route_for_what_the_source_does_not_capture_is_refused(folder):
    write(folder, "email", "name: email\nbase_url: http://email\nroutes: {peeple: {upsert: {path: /}}}\n")

    with pytest.raises(ConfigError, match=r"the stream 'peeple' is not in source\.yaml; did you mean 'people'\?"):
        FileTargetCatalog.load(folder)


def test_a_destination_has_the_files_policy_and_routes(folder, monkeypatch):
    monkeypatch.setenv("CRM_TOKEN", "s3cret-token")

    destination = FileTargetCatalog.load(folder).destination("crm")

    assert destination.policy.target == "crm"
    assert destination.policy.rate_limit == RateLimit(requests_per_second=5, burst=1)
    assert {stream: sorted(route.operations) for stream, route in destination.routes.items()} == {
        "people": ["delete", "upsert"]
    }


def test_a_missing_secret_is_its_targets_trouble_alone(folder, monkeypatch):
    """The files load, other targets are served; the sentence names file, field, variable and what to do."""
    monkeypatch.delenv("CRM_TOKEN", raising=False)
    catalog = FileTargetCatalog.load(folder)

    catalog.destination("email")
    with pytest.raises(TargetMisconfigured) as told:
        catalog.destination("crm")

    assert str(told.value).endswith(
        "crm.yaml: auth.token: the environment variable CRM_TOKEN is not set; export it where Distributary runs"
    )


def test_each_lane_gets_a_client_of_its_own_that_speaks_to_the_target(folder, monkeypatch):
    monkeypatch.setenv("CRM_TOKEN", "s3cret-token")
    with HttpApi() as api:
        file = folder / "targets" / "crm.yaml"
        file.write_text(file.read_text().replace("https://crm.example", api.url))
        connect = FileTargetCatalog.load(folder).destination("crm").connect
        first, second = connect(), connect()
        try:
            answers = [
                client.send(HttpRequest(method="GET", path="/people"), key=uuid4()) for client in (first, second)
            ]
        finally:
            first.close()
            second.close()

        assert [answer.status for answer in answers if isinstance(answer, Answer)] == [200, 200]
        assert [request.headers["authorization"] for request in api.requests] == ["Bearer s3cret-token"] * 2
        assert api.connections == 2


def test_the_lanes_of_an_oauth_target_share_one_token(folder, monkeypatch):
    """Its secrets are resolved like any other, and missing ones named with file and field."""
    tokens = []

    def answer(request: Request) -> Reply:
        if request.path == "/token":
            tokens.append(request)
            return Reply.json({"access_token": "t0ken-of-an-hour", "token_type": "bearer", "expires_in": 3600})
        return Reply(status=200 if request.headers["authorization"] == "Bearer t0ken-of-an-hour" else 401)

    with HttpApi(answer) as api:
        write(
            folder,
            "crm",
            f"""\
            name: crm
            base_url: {api.url}
            auth:
              type: oauth2_client_credentials
              token_url: {api.url}/token
              client_id: {{env: CLIENT_ID}}
              client_secret: {{env: CLIENT_SECRET}}
            routes: {{people: {{upsert: {{path: /people}}}}}}
            """,
        )
        monkeypatch.setenv("CLIENT_ID", "distributary")
        with pytest.raises(TargetMisconfigured, match=r"crm\.yaml.*auth\.client_secret.*CLIENT_SECRET"):
            FileTargetCatalog.load(folder).destination("crm")
        monkeypatch.setenv("CLIENT_SECRET", "s3cret")
        destination = FileTargetCatalog.load(folder).destination("crm")
        lanes = [destination.connect() for _ in range(3)]

        answers = [lane.send(HttpRequest(method="POST", path="/people", body=b"{}"), key=uuid4()) for lane in lanes]

        for lane in lanes:
            lane.close()
    assert [one.status for one in answers if isinstance(one, Answer)] == [200, 200, 200]
    assert len(tokens) == 1


def test_the_columns_are_those_of_all_watched_tables_as_the_database_has_them(folder):
    tables = {
        "people": SourceTable(captured=True, columns=frozenset({"id", "email"})),
        "pets": SourceTable(captured=True, columns=frozenset({"id", "name"})),
    }

    assert FileTargetCatalog.load(folder, lambda _: tables).columns() == {"id", "email", "name"}
