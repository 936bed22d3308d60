"""Read a TOML file and `--set` overrides into a validated config. Nothing here starts Ray."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

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
        raise ConfigError(
            f"There is no config file at {path.absolute()}. Correct --config, or leave it out for the default."
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem, kind) for problem in error.errors()]
        raise ConfigError(f"{path} is not a valid config:\n  " + "\n  ".join(problems)) from error


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
        settings = f"{kind.__name__} in {kind.__module__.replace('.', '/')}.py"
        return f"{dotted}: unknown key (value {problem['input']!r}); check the spelling against {settings}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted} = {problem['input']!r}: {message}"
