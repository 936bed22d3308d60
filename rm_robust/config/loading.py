"""Read a TOML file and overrides of the command line into a validated config. Nothing here starts Ray."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rm_robust.config.reference import names_of, nearest_names
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import Section, section_in
from rm_robust.errors import ConfigError

Config = TypeVar("Config", bound=Section)


def load_config(path: Path, overrides: list[str]) -> PipelineConfig:
    """Read and validate the config of a pipeline, as load_section does."""
    return load_section(path, overrides, PipelineConfig)


def load_section(path: Path, overrides: list[str], kind: type[Config]) -> Config:
    """Read and validate a config file.

    Raises ConfigError, which lists every wrong key as `dotted.name = value: what is wrong`, and says which of them the
    command line gives.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"There is no config file at {path.absolute()}. Correct --config.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    given = [_apply_override(values, override, kind) for override in overrides]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_all_problems(path, error, given, kind)) from error


def _all_problems(path: Path, error: ValidationError, given: Sequence[str], kind: type[Section]) -> str:
    """Return the message for all that is wrong; `given` are the names of the settings of the command line."""
    lines, are_given = [], []
    for problem in error.errors():
        dotted = ".".join(str(part) for part in problem["loc"])
        are_given.append(any(f"{dotted}.".startswith(f"{name}.") for name in given))
        lines.append(_describe(problem, kind) + (" (given on the command line)" if are_given[-1] else ""))
    if all(are_given):
        top = "The command line gives what is not valid"
    else:
        top = f"{path}{' with the settings of the command line' if given else ''} is not a valid config"
    return f"{top}:\n  " + "\n  ".join(lines)


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
        f"--{name} is neither an option nor a setting. {nearest(near)}{_where_all_are(name, kind)} lists the "
        "settings, --help the options."
    )


def nearest(names: Sequence[str]) -> str:
    """Return a sentence that names the nearest names, with a space after it; nothing where there are none."""
    return f"The nearest {'is' if len(names) == 1 else 'are'} {', '.join(names)}. " if names else ""


def _where_all_are(name: str, kind: type[Section]) -> str:
    """Return what lists the settings of the section that a wrong name begins with, or all settings."""
    if kind is not PipelineConfig:
        return "docs/reference/settings.md"
    section = name.partition(".")[0]
    return f"`rm-robust settings {section}`" if section in names_of(kind)[1] else "`rm-robust settings`"


def _apply_override(values: dict[str, Any], override: str, kind: type[Section]) -> str:
    """Set what an override gives, and return the name of its setting."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted.strip():
        raise ConfigError(f"--set {override!r} must look like dotted.name=value, e.g. --set rloo.num_steps=10.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    if not isinstance(value, str) and _is_text(dotted.strip(), kind):
        value = text  # --name 2024
    *parents, last = dotted.strip().split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section.")
    target[last] = value
    return dotted.strip()


def _is_text(name: str, kind: type[BaseModel]) -> bool:
    """Return whether the setting of a dotted name is text, or text that may be left out."""
    *parents, last = name.split(".")
    for parent in parents:
        section = section_in(kind.model_fields[parent].annotation) if parent in kind.model_fields else None
        if section is None:
            return False
        kind = section
    return last in kind.model_fields and kind.model_fields[last].annotation in (str, str | None)


def _describe(problem: Any, kind: type[Section]) -> str:
    dotted = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        name = ".".join(part for part in problem["loc"] if isinstance(part, str))  # without places in lists
        near = nearest(nearest_names(name, kind))
        return (
            f"{dotted}: unknown key (value {problem['input']!r}); check the spelling. {near}"
            f"{_where_all_are(name, kind)} lists the settings"
        )
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted} = {problem['input']!r}: {message}"
