"""Read `source.yaml` and `targets/*.yaml`, and say of every mistake where it is and what to write instead."""

import hashlib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from pipelines.changes.config import SourceConfig, TableConfig
from pipelines.delivery.config import RouteConfig, Secret, TargetConfig
from pipelines.delivery.routing import Transform
from pipelines.delivery.template import Place, place_text

ConfigModel = TypeVar("ConfigModel", bound=BaseModel)


class ConfigError(Exception):
    """The configuration is wrong: one line for each mistake, with file, field and fix."""


def config_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder that `DISTRIBUTARY_CONFIG` names, by default this package's own; raises ConfigError."""
    named = (os.environ if environ is None else environ).get("DISTRIBUTARY_CONFIG")
    if not named:
        return Path(__file__).parent
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"DISTRIBUTARY_CONFIG is '{named}', but there is no such folder; name the one that holds source.yaml"
        )
    return folder


def load_source(folder: Path) -> SourceConfig:
    """Read `source.yaml`; raises ConfigError."""
    return _read(folder / "source.yaml", SourceConfig)[1]


def load_targets(folder: Path) -> dict[str, TargetConfig]:
    """Read `targets/*.yaml`, sorted by the targets' names; no such folder is no targets. Raises ConfigError.

    The functions that routes name as `transform` are imported, so that a wrong name is found here.
    """
    targets: dict[str, TargetConfig] = {}
    problems: list[str] = []
    for path in _target_files(folder / "targets"):
        try:
            file, config = _read(path, TargetConfig)
            config = config.loaded_from(file.name)
            load_transforms(config)
            twin = targets.get(config.name)
            if twin is not None:
                raise file.error(("name",), f"'{config.name}' is also the name in {twin.origin}; rename one of them")
            targets[config.name] = config
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return dict(sorted(targets.items()))


def check_routes(source: SourceConfig, targets: Mapping[str, TargetConfig]) -> None:
    """Refuse routes for what the source does not capture: unknown streams, excluded columns. Raises ConfigError."""
    problems: list[str] = []
    for target in targets.values():
        for stream, route in target.routes.items():
            where = f"{_origin_of(target)}: {place_text(('routes', stream))}"
            table = source.tables.get(stream)
            if table is None:
                hint = _did_you_mean(stream, source.tables) or "add it there, or remove the route"
                problems.append(f"{where}: the stream '{stream}' is not in source.yaml; {hint}")
                continue
            hidden = sorted(route.columns() & set(table.exclude))
            problems += [
                f"{where}: its templates name the column '{column}', which source.yaml excludes; "
                "remove it here, or from 'exclude'"
                for column in hidden
            ]
            problems += [f"{where}.{problem}" for problem in _reading_problems(route, table)]
    if problems:
        raise ConfigError("\n".join(problems))


def _reading_problems(route: RouteConfig, table: TableConfig) -> Iterator[str]:
    """Yield what a route's `read` and `reconcile` ask that its table cannot give."""
    if route.read is None:
        return
    columns = table.key_columns
    if len(route.read.key) != len(columns):
        yield (
            f"read.key: names {len(route.read.key)} places, but the key in source.yaml has {len(columns)} columns "
            f"({', '.join(columns)}); give one for each, in that order"
        )
    if route.reconcile is not None and route.reconcile.delete_extra:
        for column in sorted(route.delete_columns() - set(columns)):
            yield (
                f"reconcile.delete_extra: the 'delete' names the column '{column}', but of a record that has no row "
                f"only the key is known ({', '.join(columns)}); remove either"
            )


# Secrets -------------------------------------------------------------------------------------------------------------


def resolve_secrets(config: TargetConfig, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the value of every environment variable that *config* names as a secret; raises ConfigError."""
    found: dict[str, str] = {}
    problems: list[str] = []
    for place, secret in _secrets_of(config):
        try:
            found[secret.env] = resolve_secret(
                secret, file=_origin_of(config), field=place_text(place), environ=environ
            )
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def resolve_secret(secret: Secret, *, file: str, field: str, environ: Mapping[str, str] | None = None) -> str:
    """Return the value of the environment variable that *secret* names; raises ConfigError, never with the value."""
    value = (os.environ if environ is None else environ).get(secret.env)
    where = f"{file}: {field}: the environment variable {secret.env}"
    if value is None:
        raise ConfigError(f"{where} is not set; export it where Distributary runs")
    if not value.strip():
        raise ConfigError(f"{where} is empty; give it the secret's value")
    if not value.isprintable() or value != value.strip():
        raise ConfigError(f"{where} holds a line break, control character or blank at an end; set it without")
    if not value.isascii() and not field.startswith("auth.password") and not field.startswith("auth.username"):
        raise ConfigError(f"{where} holds characters that a header cannot carry; set it to plain ASCII")
    return value


def _secrets_of(config: TargetConfig) -> Iterator[tuple[Place, Secret]]:
    auth = config.auth
    for field in ("username", "password", "token", "key", "client_id", "client_secret"):
        value = getattr(auth, field, None)
        if isinstance(value, Secret):
            yield ("auth", field), value
    for name, value in config.headers.items():
        if isinstance(value, Secret):
            yield ("headers", name), value


def _origin_of(config: TargetConfig) -> str:
    return config.origin or f"target '{config.name}'"


# Transforms ----------------------------------------------------------------------------------------------------------


def load_transforms(config: TargetConfig) -> dict[str, Transform]:
    """Import the functions that *config*'s routes name as `transform`, by those names; raises ConfigError."""
    found: dict[str, Transform] = {}
    for stream, route in config.routes.items():
        if route.transform is not None and route.transform not in found:
            where = f"{_origin_of(config)}: {place_text(('routes', stream, 'transform'))}"
            found[route.transform] = _load_transform(route.transform, where)
    return found


def _load_transform(name: str, where: str) -> Transform:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does while it is imported
        problem = f"{where}: '{module_name}' cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(f"{problem}; it must be importable where Distributary runs") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        hint = _did_you_mean(function_name, vars(module)) or "define it there"
        raise ConfigError(f"{where}: '{module_name}' has no function '{function_name}'; {hint}")
    return Transform(name=name, function=function, version=_version_of(function))


def _version_of(function: Callable[..., Any]) -> str:
    """Return a hash of the file in which *function* is written; what that file imports is not looked at."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return ""
    if file is None or not Path(file).is_file():
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


# YAML ----------------------------------------------------------------------------------------------------------------

_YAML = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML as a JSON-minded person reads it: `true` and `false` are the only switches."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_YAML}bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(f"{_YAML}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "!ambiguous", re.compile(r"^(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$"), list("yYnNoO")
)
_Loader.add_constructor("!ambiguous", lambda _, node: node.value)

_ODD_INTEGER = re.compile(r"[-+]?0[0-9_]+|.*:.*")


def _read(path: Path, model: type[ConfigModel]) -> tuple["_File", ConfigModel]:
    """Return the file at *path* and what it says as a *model*; raises ConfigError with a line for each mistake."""
    name = _shown(path)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file; see the README for what belongs into it") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}: is not UTF-8; save the file in that encoding") from None
    file, config = _understood(name, text, model)
    return file, config


@lru_cache(maxsize=1024)
def _understood(name: str, text: str, model: Any) -> Any:
    """Parse and check a text once in a process and those forked from it.

    A step reads all targets' files, so a run of n targets would do the work n times n; and so does the sensor's tick.
    """
    file = _File.parse(name, text)
    return file, file.validated(model)


class _File:
    """One YAML file: its content, and where each part of it stands."""

    def __init__(self, name: str, content: Any, root: yaml.Node) -> None:
        self.name = name
        self._content = content
        self._root = root

    @classmethod
    def parse(cls, name: str, text: str) -> "_File":
        """Understand *text*, of the file that people call *name*; raises ConfigError if it is not one mapping."""
        try:
            loader = _Loader(text)
            try:
                root = loader.get_single_node()
                if root is None:
                    raise ConfigError(f"{name}: is empty; see the README for what belongs into it")
                if not isinstance(root, yaml.MappingNode):
                    raise ConfigError(f"{name}:{_line(root)}: is not a mapping; begin with lines like 'key: value'")
                _Nodes(name).check(root, ())
                return cls(name, loader.construct_document(root), root)
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            raise ConfigError(_say_yaml_error(name, text, error)) from None

    def validated(self, model: type[ConfigModel]) -> ConfigModel:
        """Return the content as a *model*; raises ConfigError with a line for each mistake."""
        try:
            return model.model_validate(self._content)
        except ValidationError as error:
            mistakes = _mistakes(error, model, self._content)
            raise ConfigError("\n".join(str(self.error(place, said)) for place, said in mistakes)) from None

    def error(self, place: Place, problem: str) -> ConfigError:
        """Return the error that *problem* is at *place*."""
        return _error(self.name, self._line_of(place), place, problem)

    def _line_of(self, place: Place) -> int:
        """Return the line of *place*, or of the nearest part around it that is in the file."""
        node, line = self._root, _line(self._root)
        for part in place:
            inside = None
            if isinstance(node, yaml.MappingNode):
                inside = next(((k, v) for k, v in node.value if k.value == part), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                inside = (node.value[part], node.value[part])
            if inside is None:
                break
            line, node = _line(inside[0]), inside[1]
        return line


class _Nodes:
    """Looks for what YAML takes silently and no one means."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._checked: set[int] = set()
        self._around: set[int] = set()

    def check(self, node: yaml.Node, place: Place) -> None:
        if id(node) in self._around:
            raise self._error(node, place, "contains itself; write it out")
        if id(node) in self._checked:
            return
        self._around.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._check_mapping(node, place)
        elif isinstance(node, yaml.SequenceNode):
            for position, item in enumerate(node.value):
                self.check(item, (*place, position))
        else:
            self._check_scalar(node, place)
        self._around.remove(id(node))
        self._checked.add(id(node))

    def _check_mapping(self, node: yaml.MappingNode, place: Place) -> None:
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == f"{_YAML}merge":
                self.check(value, place)
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, place, "a key is a word, not a list or mapping; put it in quotes")
            here = (*place, key.value)
            if key.tag == "!ambiguous" or key.tag != f"{_YAML}str":
                raise self._error(key, here, f"YAML does not read {key.value} as text; write the key as '{key.value}'")
            if key.value in lines:
                raise self._error(key, here, f"is there twice, first in line {lines[key.value]}; remove one")
            lines[key.value] = _line(key)
            self.check(value, here)

    def _check_scalar(self, node: yaml.Node, place: Place) -> None:
        text = node.value
        # `repair: off` of a route's reconciliation is a word of its own there.
        if node.tag == "!ambiguous" and "reconcile" not in place:
            said = "true" if text.lower() in ("yes", "on") else "false"
            raise self._error(node, place, f"{text} can be read as text or as a switch; write '{text}' or {said}")
        if node.tag == f"{_YAML}timestamp":
            raise self._error(node, place, f"YAML reads {text} as a date; write '{text}'")
        if node.tag in (f"{_YAML}int", f"{_YAML}float") and _ODD_INTEGER.fullmatch(text):
            number = yaml.safe_load(text)
            raise self._error(node, place, f"YAML reads {text} as the number {number}; write '{text}' or {number}")

    def _error(self, node: yaml.Node, place: Place, problem: str) -> ConfigError:
        return _error(self._file, _line(node), place, problem)


def _target_files(folder: Path) -> list[Path]:
    if not folder.exists():
        return []
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{_shown(folder)}: cannot be read as a folder: {error.strerror}") from None
    for path in inside:
        if path.suffix == ".yml":
            raise ConfigError(f"{_shown(path)}: would not be read; rename it to {path.stem}.yaml, or move it away")
    return [path for path in inside if path.suffix == ".yaml"]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _shown(path: Path) -> str:
    """Return *path* as a person would call it: from where they stand."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _error(file: str, line: int, place: Place, problem: str) -> ConfigError:
    return ConfigError(": ".join(part for part in (f"{file}:{line}", place_text(place), problem) if part))


def _say_yaml_error(name: str, text: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return f"{name}: is not YAML: {error}"
    lines = text.splitlines()
    problem = getattr(error, "problem", None) or str(error)
    # Inside of {…} and […] the brace of ${name} ends the text.
    braces = mark.line < len(lines) and "${" in lines[mark.line]
    hint = "; put a text that holds ${…} in quotes" if braces else ""
    return f"{name}:{mark.line + 1}: is not YAML: {problem}{hint}"


# Mistakes ------------------------------------------------------------------------------------------------------------


def _mistakes(error: ValidationError, model: type[BaseModel], content: Any) -> Iterator[tuple[Place, str]]:
    """Yield what is wrong and where, a place once: where two forms are possible, both are named."""
    found: dict[Place, list[str]] = {}
    for details in error.errors(include_url=False):
        place = _place_in(content, details)
        said = found.setdefault(place, [])
        problem = _say(details, model, place)
        if problem not in said:
            said.append(problem)
    for place, said in found.items():
        yield place, ", or ".join(said)


def _place_in(content: Any, details: ErrorDetails) -> Place:
    """Return where in the file the mistake is: pydantic's location without the names of types between the keys."""
    place: list[str | int] = []
    for part in details["loc"]:
        listed = isinstance(content, list) and isinstance(part, int) and part < len(content)
        if listed or (isinstance(content, dict) and part in content):
            content = content[part]
        elif details["type"] != "missing" or part != details["loc"][-1]:
            continue
        place.append(part)
    return (*place, *details.get("ctx", {}).get("at", ()))


_KINDS = {
    "string_type": "should be text",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping of keys to values",
    "model_type": "should be a mapping of keys to values",
    "model_attributes_type": "should be a mapping of keys to values",
}


def _say(details: ErrorDetails, model: type[BaseModel], place: Place) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "refused":
        return str(context["message"])
    if kind == "missing":
        return "is missing; add it"
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        known = _keys_known_at(model, details["loc"][:-1])
        return f"unknown key; {_did_you_mean(str(place[-1]), known) or 'known are ' + ', '.join(known)}"
    shown = "the value"
    if place[:1] not in (("auth",), ("headers",), ("base_url",)):  # they may hold what must not be shown
        shown = (
            f"'{value}'" if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
        )
        if isinstance(value, dict | list):
            shown = "the mapping" if isinstance(value, dict) else "the list"
    if value is None:
        shown = "is empty; it"
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", str(context["expected"]))
        hint = _did_you_mean(str(value), expected)
        return f"{shown} is not one of {', '.join(expected)}" + (f"; {hint}" if hint else "")
    said = _KINDS.get(kind)
    if said is None:
        said = details["msg"].removeprefix("Input ")
        said = said[:1].lower() + said[1:]
    return f"{shown} {said}"


def _did_you_mean(word: str, known: Iterable[str]) -> str | None:
    near = get_close_matches(word, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else None


def _keys_known_at(annotation: Any, loc: tuple[str | int, ...]) -> list[str]:
    for part in loc:
        annotation = _inside(annotation, part)
    return [field.alias or name for found in _models(annotation) for name, field in found.model_fields.items()]


def _inside(annotation: Any, part: str | int) -> Any:
    """Return the type of what lies at *part* of a value of type *annotation*; None if nothing is known of it."""
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for option in arguments:
            if any(isinstance(mark, Tag) and mark.tag == part for mark in get_args(option)[1:]):
                return option
        return next((found for option in arguments if (found := _inside(option, part)) is not None), None)
    if origin is Annotated:
        return _inside(arguments[0], part)
    if origin is dict:
        return arguments[1]
    if origin in (list, tuple):
        return arguments[0]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        return next((field.annotation for name, field in fields.items() if part in (name, field.alias)), None)
    return None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _models(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for option in get_args(annotation):
            yield from _models(option)
