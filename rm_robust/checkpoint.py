"""A checkpoint is a plain Hugging Face directory plus one manifest, committed atomically: written beside, synced, renamed.

checkpoints/reward_model/            what transformers, vLLM and reward-bench load unchanged
    config.json  model.safetensors  tokenizer.json  …
    rm_robust_manifest.json          kind, content hash, template hash, how it was trained
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from rm_robust.errors import CheckpointError, StorageError
from rm_robust.object_storage.copies import shown
from rm_robust.object_storage.pulls import pull_folder
from rm_robust.object_storage.puts import put_folder

MANIFEST_NAME = "rm_robust_manifest.json"
CheckpointKind = Literal["reward_model", "policy"]
_STORAGE_SIGNS = ("inline_container.cc", "PytorchStreamWriter", "I/O error")
"""In the texts of torch's RuntimeError and of SafetensorError when a file takes only a part of what is written."""


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says of itself. `content_sha256` covers every other file of the directory."""

    kind: CheckpointKind
    content_sha256: str
    template_sha256: str
    training: dict[str, str | int | float]

    @property
    def calibration(self) -> tuple[float, float] | None:
        """Mean and standard deviation of a reward model's scores on held-out pairs; None where they were not measured."""
        mean, std = self.training.get("score_mean"), self.training.get("score_std")
        return (float(mean), float(std)) if mean is not None and std is not None and float(std) > 0 else None


def commit_directory(target: Path, write: Callable[[Path], None]) -> None:
    """`write` fills an empty folder beside `target`, which becomes `target` in one rename, whole or not at all; one writer at a time.

    An older `target` is moved aside just before and deleted after. A kill between these renames is the one moment without a `target`; the next
    commit then puts the older one back before it does anything else. Where the run lies in an object store, it is committed there first
    (object_storage/). Raises StorageError when it cannot be written; `target` is then as it was.
    """
    with storage_errors(target):
        _commit_directory(target, write)


@contextlib.contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """StorageError for what the operating system, torch and safetensors raise when `target` cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in _STORAGE_SIGNS):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{str(error).splitlines()[0].rstrip('.')} ({_free_bytes(target)})"
        raise StorageError(
            f"{shown(target)} could not be written: {reason}. What was committed before is as it was. Make room, or mend the storage, and run the same "
            "command again."
        ) from error


def _free_bytes(path: Path) -> str:
    """What torch and safetensors do not say of a disk that takes no more."""
    folder = next(parent for parent in path.parents if parent.exists())
    return f"{shutil.disk_usage(folder).free} bytes are free there"


def _commit_directory(target: Path, write: Callable[[Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = target.parent / f".{target.name}.partial-replaced"
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    for stale in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(stale)
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        write(partial)
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        with put_folder(partial, target):
            if target.exists():
                target.rename(replaced)
                partial.rename(target)
                shutil.rmtree(replaced)
            else:
                partial.rename(target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # it takes the room that is missing
        raise


def commit_checkpoint(
    target: Path, write: Callable[[Path], None], *, kind: CheckpointKind, template_sha256: str, training: dict[str, str | int | float]
) -> Manifest:
    """Commit what `write` saves (a Hugging Face directory) together with its manifest."""
    manifests: list[Manifest] = []

    def write_with_manifest(folder: Path) -> None:
        write(folder)
        manifest = Manifest(kind=kind, content_sha256=content_sha256(folder), template_sha256=template_sha256, training=training)
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        manifests.append(manifest)

    commit_directory(target, write_with_manifest)
    return manifests[0]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed checkpoint. Raises CheckpointError when the folder or its manifest is missing or malformed."""
    path = pull_folder(folder) / MANIFEST_NAME
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint directory at {shown(folder)}. Run the stage that commits it, or correct the path.")
    if not path.is_file():
        raise CheckpointError(f"{shown(folder)} has no {MANIFEST_NAME}: it was not committed by rm_robust, or only half copied. Copy the whole directory.")
    try:
        return Manifest(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a manifest of this version ({error}). Commit the checkpoint again with this version.") from error


def verify_checkpoint(folder: Path, kind: CheckpointKind) -> Manifest:
    """The manifest, after checking the kind and that no file changed since the commit."""
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise CheckpointError(f"{shown(folder)} is a {manifest.kind} checkpoint, and a {kind} is needed here.")
    found = content_sha256(folder)
    if found != manifest.content_sha256:
        raise CheckpointError(f"{folder} was altered after its commit: content is {found}, the manifest says {manifest.content_sha256}. Restore it.")
    return manifest


def content_sha256(folder: Path) -> str:
    """sha256 over names and bytes of every file below `folder` except the manifest, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST_NAME):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return "sha256:" + digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
