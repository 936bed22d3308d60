"""A commit shows the old directory or the new one, never a part. A manifest notices every change after it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rm_robust.errors import CheckpointError, StorageError
from rm_robust.models.checkpoint import (
    MANIFEST_NAME,
    commit_checkpoint,
    content_sha256,
    read_manifest,
    verify_checkpoint,
)
from rm_robust.runs.storage.commits import commit_directory
from tests.support.full_storage import files_of_at_most


def write_text(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "nested" / "weights.bin").write_text(text)

    return write


def weights(target: Path) -> str:
    return (target / "nested" / "weights.bin").read_text()


def commit(target: Path, text: str) -> None:
    commit_checkpoint(target, write_text(text), kind="policy", template_sha256="sha256:t", training={"seed": 3})


def void(_: object) -> None:
    return None


def fail_half_way(folder: Path) -> None:
    write_text("half")(folder)
    raise OSError("disk full")


def test_a_commit_makes_the_parents_and_leaves_nothing_beside_the_target(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "policy"
    for text in ("one", "two"):
        commit_directory(target, write_text(text))
        assert weights(target) == text
        assert list(target.parent.iterdir()) == [target]


def test_the_target_does_not_exist_while_its_first_content_is_written(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    seen: list[bool] = []
    commit_directory(target, lambda folder: seen.append(target.exists()))
    assert seen == [False]
    assert target.is_dir()


def test_a_write_that_raises_leaves_no_target_or_the_older_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with pytest.raises(StorageError, match="disk full"):
        commit_directory(target, fail_half_way)
    assert not target.exists()
    commit_directory(target, write_text("one"))
    with pytest.raises(StorageError, match="disk full"):
        commit_directory(target, fail_half_way)
    assert weights(target) == "one"


def test_a_commit_removes_what_a_killed_one_left_and_leaves_that_of_other_targets_alone(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    for killed in (".policy.partial-abc", ".policy-2.partial-abc"):
        (tmp_path / killed).mkdir()
        write_text("half")(tmp_path / killed)
    commit_directory(target, write_text("two"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".policy-2.partial-abc", "policy"]


def test_a_failed_commit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk full"):
        commit_directory(tmp_path / "policy", fail_half_way)
    assert list(tmp_path.iterdir()) == []


def test_an_older_target_that_a_kill_left_aside_survives_a_failing_commit(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    commit_directory(target, write_text("one"))
    target.rename(tmp_path / ".policy.partial-replaced")  # killed between the two renames of a replacing commit
    with pytest.raises(StorageError, match="disk full"):
        commit_directory(target, fail_half_way)
    assert weights(target) == "one"


def test_a_checkpoint_verifies_with_what_it_was_committed_with(tmp_path: Path) -> None:
    commit(tmp_path / "policy", "one")
    manifest = verify_checkpoint(tmp_path / "policy", "policy")
    assert manifest == read_manifest(tmp_path / "policy")
    assert manifest.content_sha256.startswith("sha256:")
    assert (manifest.kind, manifest.template_sha256, manifest.training) == ("policy", "sha256:t", {"seed": 3})


def test_equal_content_has_an_equal_hash_wherever_it_lies(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        commit(tmp_path / name, text)
    hashes = [read_manifest(tmp_path / name).content_sha256 for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename", "nested manifest", "move a byte between files"])
def test_every_alteration_after_the_commit_is_noticed(tmp_path: Path, change: str) -> None:
    def write(folder: Path) -> None:
        write_text("one")(folder)
        (folder / "config.json").write_text("{}")

    target = tmp_path / "policy"
    commit_checkpoint(target, write, kind="policy", template_sha256="sha256:t", training={})
    file = target / "nested" / "weights.bin"
    match change:
        case "edit":
            file.write_text("onf")
        case "add":
            (target / "extra.txt").touch()
        case "remove":
            file.unlink()
        case "rename":
            file.rename(target / "nested" / "weights.pt")
        case "nested manifest":
            (target / "nested" / MANIFEST_NAME).write_text("{}")
        case _:
            file.write_text("on")
            (target / "config.json").write_text("e{}")
    with pytest.raises(CheckpointError, match="was altered after its commit"):
        verify_checkpoint(target, "policy")


def test_the_hash_does_not_cover_the_manifest_itself(tmp_path: Path) -> None:
    commit(tmp_path / "policy", "one")
    before = content_sha256(tmp_path / "policy")
    (tmp_path / "policy" / MANIFEST_NAME).unlink()
    assert content_sha256(tmp_path / "policy") == before


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    commit(tmp_path / "policy", "one")
    with pytest.raises(CheckpointError, match="is a policy checkpoint, and a reward_model is needed"):
        verify_checkpoint(tmp_path / "policy", "reward_model")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "policy", "unknown": 1}', "\udcff"])
def test_a_manifest_that_cannot_be_read_is_refused_by_path(tmp_path: Path, text: str) -> None:
    commit(tmp_path / "policy", "one")
    path = tmp_path / "policy" / MANIFEST_NAME
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=str(path)):
        read_manifest(tmp_path / "policy")


def test_a_missing_checkpoint_and_a_foreign_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="was not committed by rm_robust"):
        read_manifest(tmp_path)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    commit(tmp_path / "policy", "one")
    assert json.loads((tmp_path / "policy" / MANIFEST_NAME).read_text())["kind"] == "policy"


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "text").write_text("x" * 200_000),
        lambda folder: torch.save({"weight": torch.zeros(100_000)}, folder / "engine.pt"),
        lambda folder: save_file({"weight": torch.zeros(100_000)}, folder / "model.safetensors"),
    ],
    ids=["text", "torch", "safetensors"],
)
def test_storage_that_is_full_in_the_middle_of_a_commit_leaves_the_older_one_and_says_so(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    target = tmp_path / "checkpoint"
    commit_directory(target, lambda folder: (folder / "text").write_text("older"))
    with (
        files_of_at_most(50_000),
        pytest.raises(StorageError, match=rf"{target} could not be written: .*What was committed before is as it was"),
    ):
        commit_directory(target, lambda folder: void(write(folder)))
    assert (target / "text").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"], "what was half written takes no room"


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path: Path) -> None:
    def write(_: Path) -> None:
        raise RuntimeError("the model is wrong")

    with pytest.raises(RuntimeError, match="the model is wrong"):
        commit_directory(tmp_path / "checkpoint", write)
