"""TOML file + `--set` overrides -> a validated PipelineConfig and a run directory. Nothing here starts Ray."""

import argparse
import json
import os
import socket
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rm_robust.config import PipelineConfig
from rm_robust.config_parts import Section
from rm_robust.errors import ConfigError
from rm_robust.object_storage.copies import local_path, shown
from rm_robust.object_storage.generations import names_in, read_text
from rm_robust.object_storage.puts import require_writable
from rm_robust.tracking import write_json_atomic

DEFAULT_CONFIG = Path("pipelines/configs/tiny_cpu.toml")
RUN_ROOT_VARIABLE = "RM_ROBUST_RUN_ROOT"
RESOLVED_NAME = "config.resolved.json"
SEEN_WITHIN_S = 60.0
"""A node may remember for as long that a name was not there (NFS, acdirmax)."""
Config = TypeVar("Config", bound=Section)


@dataclass(frozen=True)
class Run:
    """A validated config and the absolute directory that its stages share."""

    config: PipelineConfig
    run_dir: Path


def parse_run(description: str, default_config: Path, arguments: list[str] | None = None) -> Run:
    """Command line of every pipeline -> Run, whose directory may hold no run of another config. Raises ConfigError with the path, the value and the fix."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, default=default_config, help=f"TOML file (default: {DEFAULT_CONFIG}, which needs no data)")
    parser.add_argument("--run-dir", help="where this run's files go: a path, or a URI (s3://…, gs://…); the same again resumes the run")
    parser.add_argument("--set", action="append", default=[], metavar="DOTTED.NAME=VALUE", dest="overrides", help="e.g. --set rloo.num_steps=10")
    parsed = parser.parse_args(arguments)
    config = load_config(parsed.config, parsed.overrides)
    local_path(config.serve.gold)  # a URI that holds a password is refused before it is written anywhere
    run_dir = choose_run_dir(config.name, parsed.run_dir)
    check_run_dir(run_dir, config)
    return Run(config, run_dir)


def load_config(path: Path, overrides: list[str]) -> PipelineConfig:
    """The config of a pipeline; see load_section."""
    return load_section(path, overrides, PipelineConfig)


def load_section(path: Path, overrides: list[str], kind: type[Config]) -> Config:
    """Read and validate; ConfigError lists every wrong key as `dotted.name = value: what is wrong`."""
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"There is no config file at {path.absolute()}. Correct --config, or leave it out for the default.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise ConfigError(f"{path} is not a valid config:\n  " + "\n  ".join(problems)) from error


def choose_run_dir(name: str, run_dir: str | None) -> Path:
    """The absolute run directory; of one in an object store, its copy on this node. Inside a Ray job the working directory vanishes with the job, so a
    relative one is refused there."""
    if run_dir is not None:
        chosen, what = local_path(run_dir).expanduser(), f"--run-dir {run_dir}"
    else:
        chosen, what = run_root() / name, f"{RUN_ROOT_VARIABLE}={run_root()}"
    require_lasting(chosen, what, fix="Give an absolute path on storage that every node sees, or a URI (s3://…, gs://…).")
    return chosen.absolute()


def require_lasting(path: Path, what: str, *, fix: str = "Give an absolute path on storage that outlasts the job.") -> None:
    """Raise ConfigError for a relative path inside a Ray job: what is written there is lost."""
    if in_ray_job() and not path.is_absolute():
        raise ConfigError(f"{what} is relative, and a Ray job's working directory is an unpacked copy that vanishes with the job. {fix}")


def run_root() -> Path:
    """Where runs go that say nothing else."""
    return local_path(os.environ.get(RUN_ROOT_VARIABLE, "~/rm_robust/runs" if in_ray_job() else "runs")).expanduser()


def in_ray_job() -> bool:
    """True in a driver that `ray job submit` started: Ray 2.60's job supervisor hands it its job config in this variable (that is its name)."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def claim_run_dir(run_dir: Path, config: Section) -> None:
    """Write the resolved config into the run directory, or check that it is the one already there. Raises what `check_run_dir` raises."""
    if not check_run_dir(run_dir, config):
        write_json_atomic(run_dir / RESOLVED_NAME, _resolved(config))


def check_run_dir(run_dir: Path, config: Section) -> bool:
    """Whether a run of this config has begun there. Raises ConfigError where one of another config has, or nothing can be written.

    A directory that holds nothing but a config takes another one: the run before it was refused before it began. A setting that an earlier version did
    not have is no difference while it has its default.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        require_writable(run_dir)
        names = {name for name in names_in(run_dir) if not name.startswith(".")}
        if RESOLVED_NAME not in names or names == {RESOLVED_NAME}:
            return False
        earlier = json.loads(read_text(run_dir / RESOLVED_NAME))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The run directory {shown(run_dir)} cannot be used: {error}. Choose another with --run-dir.") from error
    changes = _differences(with_new_settings(earlier, type(config)), _resolved(config))
    if changes:
        raise ConfigError(
            f"{shown(run_dir)} holds a run of another config:\n  " + "\n  ".join(changes) + "\n"
            "Give this config its own --run-dir, or remove that directory to start again."
        )
    return True


def require_shared(path: Path) -> None:
    """Raise ConfigError when this node does not see what another one has written at `path`, in a run directory that is in no object store."""
    deadline_s = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"Node {socket.gethostname()} does not see {path}, which another node has written: a run directory must be on storage that every node sees. "
                f"Set {RUN_ROOT_VARIABLE} or --run-dir to a shared file system, or to a URI (s3://…, gs://…)."
            )
        time.sleep(1)


def with_new_settings(earlier: dict[str, Any], kind: type[Section]) -> dict[str, Any]:
    """A resolved config of an earlier version of this program: what it did not know of yet has its default."""
    try:
        return _resolved(kind.model_validate(earlier))
    except ValidationError:
        return earlier  # it also had what is gone now, which is a difference


def _resolved(config: Section) -> dict[str, Any]:
    """Every setting, as the file in a run directory has it."""
    settings: dict[str, Any] = json.loads(config.model_dump_json())
    return settings


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


def _describe(problem: Any) -> str:
    dotted = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{dotted}: unknown key (value {problem['input']!r}); check the spelling against rm_robust/config.py"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted} = {problem['input']!r}: {message}"


def _differences(earlier: Any, now: Any, at: str = "") -> list[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = sorted(set(earlier) | set(now))
        return [line for key in keys for line in _differences(earlier.get(key), now.get(key), f"{at}.{key}" if at else key)]
    return [] if earlier == now else [f"{at}: {earlier!r} there, {now!r} now"]
