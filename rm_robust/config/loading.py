"""Read a TOML file and overrides of the command line into a validated config. Nothing here starts Ray."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rm_robust.config.reference import names_of, nearest_names
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import Section
from rm_robust.errors import ConfigError

Config = TypeVar("Config", bound=Section)


def load_config(path: Path, overrides: list[str]) -> PipelineConfig:
    """Read and validate the config of a pipeline, as load_section does."""
    return load_section(path, overrides, PipelineConfig)


def load_section(path: Path, overrides: list[str], kind: type[Config]) -> Config:
    """Read and validate a config file.

    Raises ConfigError, which lists every wrong key as `dotted.name = value: what is wrong`.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"There is no config file at {path.absolute()}. Correct --config.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem, kind) for problem in error.errors()]
        raise ConfigError(f"{path} is not a valid config:\n  " + "\n  ".join(problems)) from error


def overrides_of(arguments: Sequence[str], kind: type[Section]) -> list[str]:
    """Return the overrides, as `--set` takes them, that a command line gives after its own options are taken out.

    `--rloo.num_steps 200` and `--rloo.num_steps=200` both give "rloo.num_steps=200", as does `--set` with that text.
    They stay in their order, so the last of several for one setting wins. Raises ConfigError for an option that names
    no setting, for one without a value, and for a value without an option.
    """
    overrides: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, value = argument.partition("=")
        if not option.startswith("--"):
            raise ConfigError(
                f"{argument!r} belongs to no option. Give a setting as --seed 3 or --seed=3, and quote a value that "
                "has spaces."
            )
        name = option.removeprefix("--")
        if name != "set":
            _check_name(name, kind)
        if not equals:
            value = next(waiting, "--")
            if value.startswith("--"):
                raise ConfigError(f"{option} has no value. Give it as {option} VALUE or {option}=VALUE.")
        overrides.append(value if name == "set" else f"{name}={value}")
    return overrides


def _check_name(name: str, kind: type[Section]) -> None:
    """Raise ConfigError, with the settings that are named nearly so, for an option that names no setting.

    A key of a setting that is a table of numbers counts as a name of a setting (`data.task_resources.gpu`).
    """
    settings, tables = names_of(kind)
    if name in settings | tables or name.rpartition(".")[0] in settings:
        return
    near = [f"--{candidate}" for candidate in nearest_names(name, kind)]
    raise ConfigError(
        f"--{name} is neither an option nor a setting. {_nearest(near)}{_where_all_are(name, kind)} lists the "
        "settings, --help the options."
    )


def _nearest(names: Sequence[str]) -> str:
    return f"The nearest {'is' if len(names) == 1 else 'are'} {', '.join(names)}. " if names else ""


def _where_all_are(name: str, kind: type[Section]) -> str:
    """Return what lists the settings of the section that a wrong name begins with, or all settings."""
    if kind is not PipelineConfig:
        return "docs/reference/settings.md"
    section = name.partition(".")[0]
    return f"`rm-robust settings {section}`" if section in names_of(kind)[1] else "`rm-robust settings`"


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted.strip():
        raise ConfigError(f"--set {override!r} must look like dotted.name=value, e.g. --set rloo.num_steps=10.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = dotted.strip().split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section.")
    target[last] = value


def _describe(problem: Any, kind: type[Section]) -> str:
    dotted = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        name = ".".join(part for part in problem["loc"] if isinstance(part, str))  # without places in lists
        near = _nearest(nearest_names(name, kind))
        return (
            f"{dotted}: unknown key (value {problem['input']!r}); check the spelling. {near}"
            f"{_where_all_are(name, kind)} lists the settings"
        )
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted} = {problem['input']!r}: {message}"
