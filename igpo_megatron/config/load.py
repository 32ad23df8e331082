"""YAML file + dotted overrides -> Config; every mistake named at once, with the nearest valid name.

    load("run.yaml", ["optim.lr=1e-5", "advantage.name=grpo"])
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from igpo_megatron.config.schema import Config


class ConfigError(ValueError):
    """The user's configuration is wrong; the message lists every problem, one per line."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(["the configuration has problems:", *(f"  - {problem}" for problem in self.problems)]))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as a string and forgets repeated keys; people mean a number, and a mistake."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, validate. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"{path}: no such configuration file; the examples/ folder has complete ones"])
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not valid YAML: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: expected sections such as `model:` at the top, found {type(values).__name__}"])
    return build(values, overrides)


def build(values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validate nested values after applying dotted overrides. Raises ConfigError."""
    problems = [problem for override in overrides if (problem := _apply(values, override))]
    if problems:
        raise ConfigError(problems)
    for section, default in (("advantage", "igpo"), ("loss", "ppo")):
        if isinstance(values.get(section), dict):
            values[section] = {"name": default, **values[section]}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_describe(detail) for detail in error.errors()]) from None


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


def _apply(values: dict[str, Any], override: str) -> str | None:
    """Set one `a.b=value` in place; return the problem, if any."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"override {override!r}: expected section.key=value, e.g. optim.lr=1e-5"
    *sections, name = key.strip().split(".")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            return f"override {override!r}: {section} is a value, not a section"
        values = inner
    # Choosing another algorithm must not inherit the settings of the one named in the file.
    if name == "name" and sections in (["advantage"], ["loss"]) and values.get("name", value) != value:
        values.clear()
    values[name] = value
    return None


def _describe(detail: ErrorDetails) -> str:
    """One pydantic error as one sentence with the dotted key."""
    parts = [str(part) for part in detail["loc"]]
    section: type[BaseModel] | None = Config
    shown: list[str] = []
    for part in parts[:-1] if detail["type"] == "extra_forbidden" else parts:
        inner = _section(section, part) if section else None
        if inner is None and section and part not in section.model_fields and shown:
            # The tag of a discriminated union appears in the location but not in the file.
            section = _section_named(section, part) or section
            continue
        shown.append(part)
        section = inner
    key = ".".join(shown)
    if detail["type"] == "extra_forbidden":
        key = ".".join([*shown, parts[-1]])
        tagged = _tagged(parts)
        known = list((tagged or section or Config).model_fields)
        near = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
        return f"{key}: unknown key; " + (f"did you mean {'.'.join([*shown, near[0]])!r}?" if near else f"known keys are {', '.join(known)}")
    found = detail.get("input")
    message = detail["msg"]
    if detail["type"] in ("literal_error", "union_tag_invalid"):
        context = detail.get("ctx", {})
        expected = [text.strip(" '") for text in str(context.get("expected") or context.get("expected_tags")).replace(" or ", ", ").split(",")]
        given = str(context.get("tag", found))
        near = difflib.get_close_matches(given, expected, n=1, cutoff=0.4)
        return f"{key}={given!r}: expected one of {', '.join(expected)}" + (f"; did you mean {near[0]!r}?" if near else "")
    if detail["type"] == "missing":
        return f"{key}: required, but not set"
    return f"{key}={found!r}: {message[0].lower()}{message[1:]}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """All model classes inside an annotation such as `Annotated[A | B, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _section(section: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The first model class of a field; None for plain values."""
    info = section.model_fields.get(field)
    models = _models(info.annotation) if info else []
    return models[0] if models else None


def _section_named(section: type[BaseModel], tag: str) -> type[BaseModel] | None:
    return section if section.model_fields.get("name") and section.model_fields["name"].default == tag else None


def _tagged(parts: list[str]) -> type[BaseModel] | None:
    """The member of a discriminated union that a location such as (advantage, grpo, key) points into."""
    if len(parts) < 3 or parts[0] not in Config.model_fields:
        return None
    for model in _models(Config.model_fields[parts[0]].annotation):
        name = model.model_fields.get("name")
        if name is not None and name.default == parts[1]:
            return model
    return None
