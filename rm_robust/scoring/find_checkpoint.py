"""Find the reward-model checkpoint that a path or a URI names: the path itself, or that of the run which lies there."""

from pathlib import Path

from rm_robust.errors import CheckpointError
from rm_robust.models.checkpoint import MANIFEST_NAME
from rm_robust.runs import files as run_files
from rm_robust.runs.directory import RESOLVED_NAME
from rm_robust.runs.layout import RunLayout


def find_reward_model(text: str) -> Path:
    """Return the directory of a committed checkpoint on this node, fetched from the object store if it lies in one.

    Raises CheckpointError when there is none, with the command that makes it, and StorageError when the object store
    cannot be reached. Which kind of checkpoint it is shows when it is loaded.
    """
    folder = run_files.locate(text)
    for checkpoint in (folder, RunLayout(folder).reward_model_checkpoint):
        if (run_files.fetch(checkpoint) / MANIFEST_NAME).is_file():
            return checkpoint
    if not run_files.is_reachable(folder):
        raise CheckpointError(f"There is no directory {text}. Name a run directory or a reward-model checkpoint.")
    if (folder / RESOLVED_NAME).is_file():
        raise CheckpointError(f"The run {text} has no committed reward model. {_train_it(text)}")
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{text} has no {MANIFEST_NAME}: it was not committed by rm_robust. If it is a reward model from "
            f"elsewhere, `rm-robust adopt {text} TARGET` makes a checkpoint of it."
        )
    raise CheckpointError(
        f"There is no committed reward model in {text}, nor in {text.rstrip('/')}/checkpoints/reward_model. "
        f"If a run lies there: {_train_it(text)}"
    )


def _train_it(run_dir: str) -> str:
    return f"Train it with `rm-robust train-reward-model --config CONFIG --run-dir {run_dir}`."
