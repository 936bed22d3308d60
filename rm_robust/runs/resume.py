"""Which stages of a run that has begun are done again or go on, and the training states that they go on from."""

import contextlib
import logging
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from rm_robust.config.changes import Change
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import OnResume
from rm_robust.errors import ConfigError
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import STAGES_WITH_STEPS, TWIN_STAGES, RunLayout

logger = logging.getLogger(__name__)

TRAINED_ON = {"sft": ("reward_model", "rloo"), "reward_model": ("rloo",), "rloo": ()}
"""The training stages whose result depends on that of another one."""


def grown_stages(
    run_dir: Path, config: PipelineConfig, changes: Iterable[Change], again: Collection[str] = ()
) -> list[str]:
    """Return the stages that have begun and get more steps than they had. Stages in `again` begin anew.

    Raises ConfigError, with the reason and the fix, for fewer steps, for a schedule that more steps would change, for a
    state that is gone, and for a later stage that was trained on the result.
    """
    grown = []
    for change in changes:
        if change.on_resume is not OnResume.MAY_GROW:
            continue
        stage = change.name.partition(".")[0]
        layout = RunLayout(run_dir)
        if change.now < change.earlier:
            raise _refused(run_dir, change, "it may grow, and not shrink: steps that are done cannot be undone")
        has_begun = layout.is_done(stage) or has_state(layout, stage)
        if not has_begun:
            continue
        later = [name for name in TRAINED_ON[stage] if name not in again and _has_begun(layout, name)]
        if later:
            options = "".join(f" --again {name}" for name in later)
            raise _refused(run_dir, change, f"{later[0]} has begun with its result. Add{options} to train it anew too")
        if stage in again:
            continue
        if not config.may_grow(stage):
            raise _refused(
                run_dir,
                change,
                f"{stage}.optimizer.schedule falls to zero at the last step, so more steps would change the rates of "
                f"the steps that are done. A constant schedule can grow. Add --again {stage} to train it anew",
            )
        if not has_state(layout, stage):
            raise _refused(
                run_dir, change, f"the training state of {stage} is gone. Add --again {stage} to train it anew"
            )
        grown.append(stage)
    return grown


def reopen(run_dir: Path, grown: Collection[str], again: Collection[str]) -> None:
    """Let the `grown` stages go on from their last state, and the stages in `again` begin anew.

    The evaluation of a reward model that goes on is done again. The results stay until others take their place.
    """
    layout = RunLayout(run_dir)
    for stage in {*grown, *(("evaluation",) if "reward_model" in grown else ())}:
        run_files.delete_file(layout.stage_record(stage))
    for stage in again:
        run_files.delete_file(layout.stage_record(stage))
        if stage in STAGES_WITH_STEPS:
            delete_states(layout, stage)
        if stage == "rloo":
            for path in (layout.rloo_samples, layout.rloo_baseline):
                run_files.delete_file(path)
        if stage in TWIN_STAGES and layout.bt_twin.is_dir():
            reopen(layout.bt_twin, (), [stage])


def has_state(layout: RunLayout, stage: str) -> bool:
    """Return whether a training stage has a committed state."""
    return bool(run_files.committed_folders(layout.training_state(stage)))


def delete_states(layout: RunLayout, stage: str) -> None:
    """Delete the training states of a stage. Raises OSError when the storage does not allow it."""
    root = layout.training_state(stage)
    for name in run_files.committed_folders(root):
        run_files.delete(root / name)
    shutil.rmtree(root, ignore_errors=True)


def delete_states_of_done(layout: RunLayout, config: PipelineConfig, stage: str) -> None:
    """Delete the training states of a stage that is done, unless it may grow or the config keeps them."""
    if stage not in STAGES_WITH_STEPS or config.kept_states == "all" or config.may_grow(stage):
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            delete_states(layout, stage)
    except OSError as error:
        logger.warning(
            "%s is no longer needed and could not be deleted: %s", run_files.shown(layout.training_state(stage)), error
        )


def _has_begun(layout: RunLayout, stage: str) -> bool:
    return layout.stage_record(stage).exists() or has_state(layout, stage)


def _refused(run_dir: Path, change: Change, reason: str) -> ConfigError:
    return ConfigError(
        f"{run_files.shown(run_dir)} holds a run with another {change.name} ({change.earlier!r} there, {change.now!r} "
        f"now): {reason}, or give this config its own --run-dir."
    )
