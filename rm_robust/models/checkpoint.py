"""A checkpoint: a plain Hugging Face directory plus one manifest, committed atomically.

It is written beside its place, synced and renamed.

checkpoints/reward_model/            what transformers, vLLM and reward-bench load unchanged
    config.json  model.safetensors  tokenizer.json  …
    rm_robust_manifest.json          kind, content hash, template hash, how it was trained
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rm_robust.errors import CheckpointError
from rm_robust.runs import files as run_files

MANIFEST_NAME = "rm_robust_manifest.json"
CheckpointKind = Literal["reward_model", "policy"]


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says about itself. `content_sha256` covers every other file of the directory."""

    kind: CheckpointKind
    content_sha256: str
    template_sha256: str
    training: dict[str, str | int | float]

    @property
    def calibration(self) -> tuple[float, float] | None:
        """Return the mean and the standard deviation of a reward model's scores on held-out pairs.

        None: they were not measured.
        """
        mean, std = self.training.get("score_mean"), self.training.get("score_std")
        return (float(mean), float(std)) if mean is not None and std is not None and float(std) > 0 else None


def commit_checkpoint(
    target: Path,
    write: Callable[[Path], None],
    *,
    kind: CheckpointKind,
    template_sha256: str,
    training: dict[str, str | int | float],
) -> Manifest:
    """Commit what `write` saves (a Hugging Face directory) together with its manifest."""
    manifests: list[Manifest] = []

    def write_with_manifest(folder: Path) -> None:
        write(folder)
        manifest = Manifest(
            kind=kind, content_sha256=content_sha256(folder), template_sha256=template_sha256, training=training
        )
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        manifests.append(manifest)

    run_files.commit(target, write_with_manifest)
    return manifests[0]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a committed checkpoint.

    Raises CheckpointError when the folder or its manifest is missing or malformed.
    """
    path = run_files.fetch(folder) / MANIFEST_NAME
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no checkpoint directory at {run_files.shown(folder)}. "
            "Run the stage that commits it, or correct the path."
        )
    if not path.is_file():
        raise CheckpointError(
            f"{run_files.shown(folder)} has no {MANIFEST_NAME}: it was not committed by rm_robust, or only half of it "
            "was copied. Copy the whole directory; a reward model from elsewhere becomes a checkpoint with "
            f"`rm-robust adopt {run_files.shown(folder)} NEW_DIRECTORY`."
        )
    try:
        return Manifest(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a manifest of this version ({error}). Commit the checkpoint again with this version."
        ) from error


def verify_checkpoint(folder: Path, kind: CheckpointKind) -> Manifest:
    """Return the manifest, after checking the kind and that no file has changed since the commit."""
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise CheckpointError(
            f"{run_files.shown(folder)} is a {manifest.kind} checkpoint, and a {kind} is needed here."
        )
    content_hash = content_sha256(folder)
    if content_hash != manifest.content_sha256:
        raise CheckpointError(
            f"{folder} was altered after its commit: its content is {content_hash}, and the manifest says "
            f"{manifest.content_sha256}. Restore it, or do the stage that commits it again: "
            "`rm-robust run --again STAGE`."
        )
    return manifest


def content_sha256(folder: Path) -> str:
    """Return the sha256 over names and bytes of every file below `folder` except the manifest, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST_NAME):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        digest.update(bytes.fromhex(run_files.sha256(path)))
    return "sha256:" + digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file. Raises CheckpointError when the file is missing or holds no JSON object."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no {path}. Give a Hugging Face model directory: config.json, safetensors and a tokenizer."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download or copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download or copy it again.")
    return content
