"""Where a run's directory is, and which config it belongs to. Nothing here starts Ray."""

import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rm_robust.config.changes import Change, changes_between
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import OnResume, Section
from rm_robust.errors import ConfigError
from rm_robust.runs.files import refresh_records
from rm_robust.runs.layout import SHARED_NAME
from rm_robust.runs.resume import grown_stages, reopen
from rm_robust.runs.storage.commits import write_json_atomic
from rm_robust.runs.storage.copies import LOG, local_path, shown, uri_of
from rm_robust.runs.storage.generations import names_in, read_text
from rm_robust.runs.storage.transfer import require_writable

logger = logging.getLogger(__name__)

RUN_ROOT_VARIABLE = "RM_ROBUST_RUN_ROOT"
RESOLVED_NAME = "config.resolved.json"
COPY_NAME = ".config.resolved.json"
"""A second copy of the config, for a run whose first one is lost."""
LOGS_NAME = "logs"
SEEN_WITHIN_S = 60.0
"""Seconds for which a node may remember that a name was not there (acdirmax of NFS)."""


@dataclass(frozen=True)
class Run:
    """A validated config and the absolute directory that its stages share."""

    config: PipelineConfig
    run_dir: Path
    again: tuple[str, ...] = ()
    """Stages that begin anew, though they may be done."""


def choose_run_dir(name: str, run_dir: str | None) -> Path:
    """Return the absolute run directory; for a run in an object store, the path of its copy on this node.

    Raises ConfigError for a relative path inside a Ray job, whose working directory vanishes with the job.
    """
    if run_dir is not None:
        chosen, given_as = local_path(run_dir).expanduser(), f"--run-dir {run_dir}"
    else:
        chosen, given_as = run_root() / name, f"{RUN_ROOT_VARIABLE}={run_root()}"
    require_lasting(
        chosen, given_as, fix="Give an absolute path on storage that every node sees, or a URI (s3://…, gs://…)."
    )
    return chosen.absolute()


def require_lasting(
    path: Path, given_as: str, *, fix: str = "Give an absolute path on storage that outlasts the job."
) -> None:
    """Raise ConfigError for a relative path inside a Ray job: what is written there is lost.

    `given_as` names the path in the message, e.g. "--out table".
    """
    if in_ray_job() and not path.is_absolute():
        raise ConfigError(
            f"{given_as} is relative, and a Ray job's working directory is an unpacked copy that vanishes with the "
            f"job. {fix}"
        )


def run_root() -> Path:
    """Return the folder of runs whose command names no directory."""
    return local_path(os.environ.get(RUN_ROOT_VARIABLE, "~/rm_robust/runs" if in_ray_job() else "runs")).expanduser()


def in_ray_job() -> bool:
    """Return whether `ray job submit` started this driver.

    Ray 2.60's job supervisor hands the driver its job config in this variable, which really has this name.
    """
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def claim_run_dir(run_dir: Path, config: Section, again: Sequence[str] = ()) -> None:
    """Write the resolved config into the run directory, or take over the settings that may change.

    Every change is logged. Stages that get more steps go on, and the stages in `again` begin anew. Raises what
    `check_run_dir` raises.
    """
    changes = changes_in(run_dir, config, again)
    if changes is not None:
        for change in changes:
            logger.warning("setting changed since this run began: %s", change)
        grown = grown_stages(run_dir, config, changes, again) if isinstance(config, PipelineConfig) else []
        reopen(run_dir, grown, again)
    for name in (COPY_NAME, RESOLVED_NAME):
        if changes != [] or _settings_in(run_dir, name) is None:
            write_json_atomic(run_dir / name, _resolved(config))


def check_run_dir(run_dir: Path, config: Section, again: Sequence[str] = ()) -> bool:
    """Return whether a run of this config has begun in the directory. Raises what `changes_in` raises."""
    return changes_in(run_dir, config, again) is not None


def changes_in(run_dir: Path, config: Section, again: Sequence[str] = ()) -> list[Change] | None:
    """Return the settings that differ from those of the run in the directory; None when no run has begun there.

    A directory that holds nothing but a config and logs accepts another config: the earlier run was refused before it
    began. A setting that an earlier version did not have is no difference while it has its default. Raises ConfigError
    when a setting that decides results differs, when one that may grow cannot, when a run has lost its config, or when
    nothing can be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        require_writable(run_dir)
        names = {name for name in names_in(run_dir) if not name.startswith(".")} - {LOGS_NAME, RESOLVED_NAME}
        if not names:
            return None
        earlier = _earlier_settings(run_dir)
    except OSError as error:
        raise ConfigError(
            f"The run directory {shown(run_dir)} cannot be used: {error}. Choose another with --run-dir."
        ) from error
    if earlier is None:
        return None
    changes = changes_between(with_new_settings(earlier, type(config)), _resolved(config), config)
    refused = [str(change) for change in changes if change.on_resume is OnResume.DECIDES_RESULTS]
    if refused:
        raise ConfigError(
            f"{shown(run_dir)} holds a run of another config:\n  " + "\n  ".join(refused) + "\n"
            "Give this config its own --run-dir, or remove that directory to start again."
        )
    if isinstance(config, PipelineConfig):
        refresh_records(run_dir)
        grown_stages(run_dir, config, changes, again)
    return changes


def reopened_by(run_dir: Path, config: PipelineConfig, again: Sequence[str]) -> list[str]:
    """Return the stages that `claim_run_dir` will let go on because they get more steps."""
    if all(_settings_in(run_dir, name) is None for name in (RESOLVED_NAME, COPY_NAME)):
        return []
    return grown_stages(run_dir, config, changes_in(run_dir, config, again) or [], again)


def _earlier_settings(run_dir: Path) -> dict[str, Any] | None:
    """Return the settings of the run in the directory, from its config or from the copy of it; None without a run.

    Raises ConfigError when both are gone and the run has committed something.
    """
    for name in (RESOLVED_NAME, COPY_NAME):
        settings = _settings_in(run_dir, name)
        if settings is not None:
            return settings
    has_stages = any((run_dir / "stages").glob("*.json")) and not (run_dir / SHARED_NAME).exists()
    if has_stages or RESOLVED_NAME in names_in(run_dir) or any(run_dir.glob("*/state/step-*")):
        raise ConfigError(
            f"The run directory {shown(run_dir)} cannot be used: {RESOLVED_NAME} is missing or damaged, so nobody "
            "knows which config this run has. Restore it, or choose another directory with --run-dir."
        )
    return None


def _settings_in(run_dir: Path, name: str) -> dict[str, Any] | None:
    """Return the settings in a file; None when it is missing or holds none."""
    try:
        settings = json.loads(read_text(run_dir / name))
    except (FileNotFoundError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def new_log(run_dir: Path) -> Path:
    """Return the file for the log lines of the command that now begins; each command on the directory has its own."""
    return run_dir / LOGS_NAME / f"{time.strftime('%Y%m%d-%H%M%S')}{LOG}"


def require_shared(path: Path) -> None:
    """Raise ConfigError when this node does not see what another one has written at `path`.

    A file of a run in an object store is seen by every node that can reach the store, so nothing is checked for it.
    """
    if uri_of(path) is not None:
        return
    deadline_s = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"Node {socket.gethostname()} does not see {path}, which another node has written: a run directory "
                f"must be on storage that every node sees. Set {RUN_ROOT_VARIABLE} or --run-dir to a shared file "
                "system, or to a URI (s3://…, gs://…)."
            )
        time.sleep(1)


def with_new_settings(earlier: dict[str, Any], kind: type[Section]) -> dict[str, Any]:
    """Return the resolved config of an earlier version of this program, with the defaults of settings that it did not
    have."""
    try:
        return _resolved(kind.model_validate(earlier))
    except ValidationError:
        return earlier  # it has settings that are gone, which is a difference


def _resolved(config: Section) -> dict[str, Any]:
    """Return every setting as config.resolved.json has it."""
    settings: dict[str, Any] = json.loads(config.model_dump_json())
    return settings
