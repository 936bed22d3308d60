"""Begin a run with the stages of another one: controlled twins that differ only in what comes later."""

import json
import os
import shutil
from pathlib import Path

from rm_robust.object_storage.copies import uri_of
from rm_robust.object_storage.pulls import pull_anew
from rm_robust.object_storage.puts import put_file, put_folder

FILES = {
    "world": ["world"],
    "sft": ["checkpoints/sft"],
    "preferences": ["preferences", "rloo/prompts"],
    "reward_model": ["checkpoints/reward_model"],
    "evaluation": ["evaluation", "evaluation.json"],
}
"""What later stages and the report read of each stage's work."""


def share_stages(source: Path, run_dir: Path, stages: list[str]) -> None:
    """`run_dir` becomes a run that has done these stages, as `source` did them; one that exists already is left alone."""
    if uri_of(run_dir) is not None:
        pull_anew(run_dir)
        if (run_dir / "stages" / f"{stages[-1]}.json").exists():
            return
        shutil.rmtree(run_dir, ignore_errors=True)  # it was put in part
    if run_dir.exists():
        return
    staging = run_dir.with_name(f".{run_dir.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    for name in [name for stage in stages for name in (f"stages/{stage}.json", *FILES[stage])]:
        path, target = source / name, staging / name
        if not path.exists():  # a stage that the run's config leaves out
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_link)
        else:
            _link(path, target)
    lines = (source / "metrics.jsonl").read_text().splitlines()
    (staging / "metrics.jsonl").write_text("".join(line + "\n" for line in lines if json.loads(line)["stage"] in stages))
    staging.rename(run_dir)
    if uri_of(run_dir) is not None:
        put_stages(run_dir, stages)


def put_stages(run_dir: Path, stages: list[str]) -> None:
    """A stage's record last: it says that the rest is there."""
    for stage in stages:
        for path in [run_dir / name for name in FILES[stage]]:
            if path.is_dir():
                with put_folder(path, path):
                    pass  # the copy is that already
            elif path.exists():
                put_file(path)
    put_file(run_dir / "metrics.jsonl")
    for stage in stages:
        if (run_dir / "stages" / f"{stage}.json").exists():  # else it is one that the config leaves out
            put_file(run_dir / "stages" / f"{stage}.json")


def _link(source: Path | str, target: Path | str) -> None:
    """Files of a committed stage are replaced, never changed, so two runs may have them in common; a copy where the file system knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
