"""YAML file + dotted overrides -> Config; reports all mistakes at once, with the nearest valid name.

load("run.yaml", ["optim.lr=1e-5", "advantage.name=grpo"])
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from igpo_megatron.config.schema import Config
from igpo_megatron.settings import HOOK_RULE, HOOKED, OURS, Hooked
from igpo_megatron.types import UserError

ALGORITHMS = {"advantage": "igpo", "loss": "ppo", "rollout.branching": "none"}
"""Sections whose keys depend on their `name`, and the name taken where none is given."""


class ConfigError(UserError):
    """The user's configuration is wrong; the message lists every problem, one per line."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(["the configuration has problems:", *(f"  - {problem}" for problem in self.problems)]))


def parse(text: str) -> Any:
    """YAML 1.2, in which 1e-5 is a number, `off` a word, and a key given twice a mistake. Raises ValueError with line and column."""
    try:
        # A new parser each time: a %YAML line would change it for the next text.
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # For a repeated key the message would continue with both values, which may be complete sections.
        problem = str(error.problem).partition(" with value ")[0]
        raise ValueError(f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(error)) from None
    except (YAMLError, LookupError, RecursionError) as error:  # LookupError: of values such as `!!bool maybe`
        raise ValueError(str(error)) from None


def load(path: Path | str, overrides: Sequence[str] = (), *, model: str | None = None) -> Config:
    """Read a YAML file, or the config.json of a run, apply `section.key=value` overrides, validate. Raises ConfigError.

    `model`: model.path where the file has none, which is otherwise refused.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        # As YAML, the two halves of an escaped emoji would be two characters.
        values = (json.loads(text) if path.suffix == ".json" else parse(text)) or {}
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such configuration file; the examples/ folder has complete ones"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: {os.strerror(error.errno or 0).lower()}; expected a configuration file"]) from None
    except ValueError as error:
        raise ConfigError([f"{path}: not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: expected sections such as `model:` at the top, found {type(values).__name__}"])
    if model is not None and isinstance(section := values.get("model") or {}, dict):
        values["model"] = {"path": model, **section}
    return build(values, overrides)


def build(values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validate nested values after applying dotted overrides; `values` is not modified. Raises ConfigError."""
    # A section whose lines are all commented out reads as null and means its defaults.
    values = {key: {} if value is None else copy.deepcopy(value) for key, value in values.items()}
    problems = [problem for override in overrides if (problem := _apply(values, override))]
    for section, default in ALGORITHMS.items():
        *parents, last = section.split(".")
        holder: Any = values
        for part in parents:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(last), dict):
            holder[last] = {"name": default, **holder[last]}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems + [_describe(detail) for detail in error.errors()]) from None
    if problems:
        raise ConfigError(problems)
    return config


def to_json(config: Config) -> str:
    """The resolved configuration. Holds names of environment variables, never their values."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two resolved configurations, with both values."""
    rows = []
    for key in sorted(old.keys() | new.keys()):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            rows += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            rows.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return rows


def explain(name: str | None = None) -> str:
    """Help from the schema's own docstrings: all sections, one section such as `rollout.engine`, or one key such as `optim.lr`.

    Raises ConfigError for a name that does not exist.
    """
    if name is None:
        return "\n".join(f"{section:<12}{_section_summary(section)}" for section in Config.model_fields)
    *parents, last = name.split(".")
    holders = [model for model in _sections_at(parents) if last in model.model_fields]
    if not holders:
        near = _nearest(name, _dotted_keys(Config))
        raise ConfigError([f"{name}: no such section or key; " + (f"did you mean {near!r}?" if near else "`igpo config` lists them")])
    inner_models = [inner for model in holders for inner in _members(model, last)]
    if inner_models:
        return "\n\n".join(_explain_model(name, model, chosen_by_name=len(inner_models) > 1) for model in inner_models)
    return _explain_field(name, holders[0].model_fields[last])


def _apply(values: dict[str, Any], override: str) -> str | None:
    """Set one `a.b=value` in place; return the problem, if any."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        return f"override {override!r}: expected section.key=value, e.g. optim.lr=1e-5"
    *sections, name = key.strip().split(".")
    try:
        value = parse(text)
    except ValueError:
        value = text
    for part in sections:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            return f"override {override!r}: {part} is a value, not a section"
        values = inner
    # Another algorithm must not inherit the settings of the one named in the file.
    section = ".".join(sections)
    if name == "name" and section in ALGORITHMS and values.get("name", ALGORITHMS[section]) != value:
        values.clear()
    values[name] = value
    return None


def _describe(detail: ErrorDetails) -> str:
    """One pydantic error as one sentence with the dotted key: what was found, what was expected."""
    shown, model = _walk([str(part) for part in detail["loc"]])
    key = ".".join(shown)
    found = detail.get("input")
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return _describe_unknown(shown, model)
        case "literal_error" | "union_tag_invalid":
            named = re.findall(r"'([^']*)'|\b(\d+)\b", str(context.get("expected") or context.get("expected_tags")))
            expected = [text or number for text, number in named]
            tag = context.get("tag")
            near = _nearest(str(found if tag is None else tag), expected)
            left = f"{key}={found!r}" if tag is None else f"{key}.name={tag!r}"
            hook = f", or {HOOKED}" if OURS in detail["loc"] else ""
            return f"{left}: expected one of {', '.join(expected)}{hook}" + (f"; did you mean {near!r}?" if near else "")
        case "missing":
            return f"{key}: required, but not set"
        case "model_type" | "model_attributes_type":
            if key in ALGORITHMS:
                return f"{key}={found!r}: expected a section; write {key}.name={found}"
            return f"{key}={found!r}: expected a section with keys {', '.join((model or Config).model_fields)}"
        case "tuple_type":
            return f"{key}={found!r}: expected a list, e.g. {key}=[{found}]"
    message = detail["msg"]
    return f"{key}={found!r}: {message[0].lower()}{message[1:]}"


def _describe_unknown(shown: list[str], model: type[BaseModel] | None) -> str:
    """An unknown key, with the nearest key beside it, or the places where a key of that name exists."""
    key, known = ".".join(shown), list((model or Config).model_fields)
    near = _nearest(shown[-1], known)
    if near:
        return f"{key}: unknown key; did you mean {'.'.join([*shown[:-1], near])!r}?"
    section = ".".join(shown[:-1])
    choices = _sections_at(shown[:-1]) if section in ALGORITHMS else []
    algorithms = [_name_of(other) for other in choices if _nearest(shown[-1], other.model_fields)]
    elsewhere = [other for other in _dotted_keys(Config) if other.split(".")[-1] == shown[-1] and other.split(".")[0] != shown[0]]
    if algorithms and model is not None:
        hint = f"a key like it belongs to {section}.name={' or '.join(algorithms)}, not {_name_of(model)}; "
    else:
        hint = f"did you mean {' or '.join(elsewhere)}? " if elsewhere else ""
    return f"{key}: unknown key; {hint}known here: {', '.join(known)}"


def _walk(location: Sequence[str]) -> tuple[list[str], type[BaseModel] | None]:
    """pydantic's location -> (keys as written in the file, model class that holds the last key).

    A location such as (advantage, grpo, gama) contains the algorithm's name, which the file's key advantage.gama lacks.
    """
    shown: list[str] = []
    holder: type[BaseModel] | None = None
    candidates: list[type[BaseModel]] = [Config]
    for part in location:
        if part in (OURS, HOOKED):
            candidates = [model for model in candidates if issubclass(model, Hooked) == (part == HOOKED)]
            continue
        named = [model for model in candidates if len(candidates) > 1 and model.model_fields["name"].default == part]
        if named:
            candidates = named
            continue
        shown.append(part)
        holder = candidates[0] if len(candidates) == 1 else None
        candidates = [inner for model in candidates for inner in _members(model, part)]
    # An error about a section itself is described by that section's keys.
    return shown, candidates[0] if len(candidates) == 1 else holder


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def _sections_at(keys: Sequence[str]) -> list[type[BaseModel]]:
    """The section classes that keys such as rollout, engine may lead to."""
    models: list[type[BaseModel]] = [Config]
    for key in keys:
        models = [inner for model in models for inner in _members(model, key)]
    return models


def _members(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    """The section classes a field may hold: one for a section, several for a choice of algorithms, none for a plain value."""
    info = model.model_fields.get(field)
    return _models(info.annotation) if info else []


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every section and key as it is written in an override."""
    keys: dict[str, None] = {}
    for name in model.model_fields:
        keys[prefix + name] = None
        for inner in _members(model, name):
            keys.update(dict.fromkeys(_dotted_keys(inner, f"{prefix}{name}.")))
    return list(keys)


def _section_summary(section: str) -> str:
    models = _members(Config, section)
    if len(models) > 1:
        return f"One of {', '.join(map(_name_of, models))}, chosen by `name`."
    return (models[0].__doc__ or "").strip()


def _name_of(model: type[BaseModel]) -> str:
    """The `name` that selects a section, or the form of a hook."""
    return HOOKED if issubclass(model, Hooked) else str(model.model_fields["name"].default)


def _explain_model(name: str, model: type[BaseModel], *, chosen_by_name: bool) -> str:
    title = f"{name}.name={_name_of(model)}" if chosen_by_name else name
    fields = "\n".join(_explain_field(key, info) for key, info in model.model_fields.items())
    return f"{_filled(f'{title}: {model.__doc__ or str()}', 80, hanging=4)}\n{textwrap.indent(fields, '  ')}"


def _filled(text: str, width: int, hanging: int = 0) -> str:
    """Its paragraphs in lines of at most `width` columns, but for longer words; all lines but a paragraph's first are indented."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    wrap = textwrap.TextWrapper(width, subsequent_indent=" " * hanging, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(map(wrap.fill, paragraphs))


def _explain_field(name: str, info: FieldInfo) -> str:
    bounds = "".join(
        f" {sign} {getattr(rule, word)}" for rule in info.metadata for word, sign in _SIGNS if getattr(rule, word, None) is not None
    )
    default = "required" if info.is_required() else f"default {_plain(info.default)}"
    described = "\n" + textwrap.indent(_filled(info.description, 74), "    ") if info.description else ""
    return f"{name}  ({_type_name(info.annotation)}{bounds}, {default}){described}"


_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def _plain(value: Any) -> str:
    """A default as it would be written in YAML."""
    if isinstance(value, BaseModel):
        return "its own defaults"
    return json.dumps(value, default=str)


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return HOOKED if HOOK_RULE in arguments else _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(_type_name(part) for part in arguments)
    if origin is tuple:
        return "list of " + _type_name(arguments[0])
    return {NoneType: "null", Path: "path", str: "text"}.get(annotation) or annotation.__name__
