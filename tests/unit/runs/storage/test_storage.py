"""A run in an object store, against moto's S3 server: every node sees what is committed, whole, and nothing else.

Each node has a cache of its own: RM_ROBUST_CACHE names its folder.
"""

import hashlib
import json
import os
import posixpath
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.command import main as rm_robust
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import CheckpointError, ConfigError, DataError, StorageError
from rm_robust.models.checkpoint import commit_checkpoint, verify_checkpoint
from rm_robust.runs import layout as shared_stages
from rm_robust.runs.directory import choose_run_dir, claim_run_dir
from rm_robust.runs.layout import RunLayout, share_stages
from rm_robust.runs.metrics import MetricsWriter, read_metrics
from rm_robust.runs.storage import transfer
from rm_robust.runs.storage.__main__ import main
from rm_robust.runs.storage.commits import commit_directory, write_json_atomic
from rm_robust.runs.storage.copies import CACHE_VARIABLE, copies_of_ones_own, local_path, uri_of
from rm_robust.runs.storage.filesystems import filesystem_of
from rm_robust.runs.storage.generations import COMMIT, committed_in
from rm_robust.runs.storage.transfer import (
    delete_uncommitted,
    forget_uncommitted,
    pull,
    pull_anew,
    pull_files,
    pull_folder,
    put_file,
    written_by_any_node,
)
from rm_robust.training.state import committed_steps, load_state, save_state
from tests.support.s3_server import S3Server, s3_server
from tests.unit.training.test_state import new_engine, train

RUN = "s3://runs/deep/mine"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def node(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Return a function that moves this process to a named node and returns the copy of the run directory there."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.put("runs", {})
    filesystem_of.cache_clear()

    def copy_on(name: str) -> Path:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
        return local_path(RUN)

    yield copy_on
    client = server.client()
    for key in [entry["Key"] for entry in client.list_objects_v2(Bucket="runs").get("Contents", [])]:
        client.delete_object(Bucket="runs", Key=key)
    filesystem_of.cache_clear()


def write_two(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "nested" / "a.bin").write_text(f"{text} a")
        (folder / "b.bin").write_text(f"{text} b")

    return write


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def whole(text: str) -> dict[str, str]:
    return {"b.bin": f"{text} b", "nested/a.bin": f"{text} a"}


def test_a_copy_knows_its_uri_wherever_it_lies_and_other_paths_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert uri_of(local_path("s3://runs/mine/") / "checkpoints" / "policy") == "s3://runs/mine/checkpoints/policy"
    assert uri_of(tmp_path / "runs") is None
    assert local_path("runs/mine") == Path("runs/mine")
    for wrong in ("ftp://host/runs", "s3://", "s3://runs/mine?region=here"):
        with pytest.raises(DataError, match="cannot hold a run"):
            local_path(wrong)
    with pytest.raises(DataError, match="holds a password") as refused:
        local_path("s3://key:secret@runs/mine")
    assert "secret" not in str(refused.value)


def test_a_folder_committed_on_one_node_is_whole_on_another_and_only_its_newest_generation_stays(
    node: Callable[[str], Path], server: S3Server
) -> None:
    for text in ("one", "two"):
        commit_directory(node("first") / "world", write_two(text))
        assert contents(pull_folder(node("second") / "world")) == whole(text) == contents(node("first") / "world")
    generation = json.loads(server.client().get_object(Bucket="runs", Key=f"deep/mine/world/{COMMIT}")["Body"].read())[
        "generation"
    ]
    assert server.keys("runs") == sorted(
        f"deep/mine/world/{key}" for key in (COMMIT, f"{generation}/b.bin", f"{generation}/nested/a.bin")
    )


def test_what_is_written_beside_a_folder_before_its_commit_is_not_put_by_itself(
    node: Callable[[str], Path], server: S3Server
) -> None:
    """The JSON files of a checkpoint are written by write_json_atomic, which also puts files into the store."""
    commit_directory(node("first") / "policy", lambda folder: write_json_atomic(folder / "config.json", {"a": 1}))
    keys = server.keys("runs")
    assert len(keys) == 2
    assert all(key.startswith("deep/mine/policy/") for key in keys), keys


def test_a_pull_of_the_run_brings_files_and_folders_but_no_training_state_unless_that_is_named(
    node: Callable[[str], Path],
) -> None:
    run_dir = node("first")
    commit_directory(run_dir / "sft" / "base", write_two("base"))
    commit_directory(run_dir / "sft" / "state" / "step-0000004", write_two("state"))
    (run_dir / "stages").mkdir()
    write_json_atomic(run_dir / "stages" / "sft.json", {"stage": "sft"})
    run_dir = node("second")
    assert contents(pull(run_dir) / "sft" / "base") == whole("base")
    assert json.loads((run_dir / "stages" / "sft.json").read_text()) == {"stage": "sft"}
    assert not (run_dir / "sft" / "state").exists()
    assert contents(pull_folder(run_dir / "sft" / "state" / "step-0000004")) == whole("state")
    assert (
        pull_folder(node("third") / "sft" / "base" / "nested" / "a.bin")
    ).read_text() == "base a"  # inside a committed folder
    pull_folder(node("none") / "sft")
    assert not node("none").exists(), "a folder that is none brings nothing"
    assert set(contents(pull_files(node("fourth")))) == {"stages/sft.json"}


def test_a_second_pull_downloads_nothing(node: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = node("first")
    commit_directory(run_dir / "world", write_two("one"))
    write_json_atomic(run_dir / "summary.json", {})
    downloaded: list[str] = []
    monkeypatch.setattr(
        "rm_robust.runs.storage.transfer.download", lambda filesystem, inner, path: downloaded.append(inner)
    )
    pull(run_dir)
    assert downloaded == []
    (run_dir / "world").rename(run_dir / "gone")
    with pytest.raises(StorageError, match=r"\.world\.partial-pull/b\.bin"):  # it tries: the stand-in makes no file
        pull(run_dir)
    assert len(downloaded) == 1


def test_an_object_of_other_bytes_than_were_committed_is_refused_by_its_name(
    node: Callable[[str], Path], server: S3Server
) -> None:
    commit_directory(node("first") / "world", write_two("one"))
    (key,) = (key for key in server.keys("runs") if key.endswith("b.bin"))
    server.put("runs", {key: b"one B"})
    with pytest.raises(CheckpointError, match=rf"s3://runs/{key} has other bytes than were committed"):
        pull(node("second"))
    assert not (node("second") / "world").exists()
    server.put("runs", {f"deep/mine/world/{COMMIT}": b"{}"})
    with pytest.raises(CheckpointError, match=r"is not what this program commits"):
        pull(node("third"))


OUTSIDE = ["../../outside", "nested/../../outside", "/{tmp_path}/outside"]


@pytest.mark.parametrize("key", [*OUTSIDE, "./b.bin", "nested//a.bin", "nested\\a.bin", "a\0"])
def test_a_commit_that_names_a_file_outside_of_its_folder_is_refused_and_nothing_is_written(
    node: Callable[[str], Path], server: S3Server, tmp_path: Path, key: str
) -> None:
    commit_directory(node("first") / "world", write_two("one"))
    commit_key, key = f"deep/mine/world/{COMMIT}", key.format(tmp_path=str(tmp_path).strip("/"))
    commit = json.loads(server.client().get_object(Bucket="runs", Key=commit_key)["Body"].read())
    name = posixpath.normpath(f"deep/mine/world/{commit['generation']}/{key}")  # what pyarrow asks for
    hostile = commit | {"files": {key: {"num_bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}}
    server.put("runs", {commit_key: json.dumps(hostile).encode()} | ({} if "\0" in key else {name: b"x"}))
    with pytest.raises(CheckpointError) as refused:
        pull_folder(node("second") / "world")
    assert f"s3://runs/{commit_key} is not what this program commits" in str(refused.value)
    assert repr(key) in str(refused.value).replace("\\\\", "\\")
    assert contents(tmp_path / "second") == {}
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("generation", ["generation-../../other", "..", "generation-1", "", None])
def test_a_commit_of_a_generation_that_no_commit_makes_is_refused(
    node: Callable[[str], Path], server: S3Server, generation: str | None
) -> None:
    node("first")
    server.put("runs", {f"deep/mine/world/{COMMIT}": json.dumps({"generation": generation, "files": {}}).encode()})
    with pytest.raises(CheckpointError, match="is not what this program commits"):
        pull_folder(node("second") / "world")


@pytest.mark.parametrize("key", [*OUTSIDE, "../../world/.commit.json", "./summary.json", "back\\slash"])
@pytest.mark.parametrize("fetch", [pull, pull_files, pull_anew, delete_uncommitted])
def test_an_object_that_would_be_a_file_outside_of_the_run_is_refused_by_its_name(
    node: Callable[[str], Path], server: S3Server, tmp_path: Path, key: str, fetch: Callable[[Path], object]
) -> None:
    key = key.format(tmp_path=str(tmp_path).strip("/"))
    server.put("runs", {f"deep/mine/{key}": b"{}", posixpath.normpath(f"deep/mine/{key}"): b"{}"})
    with pytest.raises(CheckpointError, match=re.escape(f"{RUN} holds the object {key!r}")):
        fetch(node("second"))
    assert contents(tmp_path) == {}


def test_what_other_nodes_write_for_a_commit_stays_in_its_folder(
    node: Callable[[str], Path], server: S3Server, tmp_path: Path
) -> None:
    run_dir = node("first")
    with (
        pytest.raises(CheckpointError, match=r"holds the object '\.\./outside'"),
        written_by_any_node(tmp_path / "staged", run_dir / "tokens") as (written, _),
    ):
        server.put("runs", {f"{written.removeprefix('runs/')}/../outside": b"x", "deep/mine/tokens/outside": b"x"})
    assert contents(tmp_path) == {}


KILLED = """
import os, signal, sys
from rm_robust.runs.storage import commits, copies, generations, transfer
from tests.unit.runs.storage.test_storage import RUN, write_two

where, upload = sys.argv[1], generations._upload

def end(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def upload_or_end(filesystem, path, inner):
    if path.name == where:
        stream = filesystem.open_output_stream(inner)
        stream.write(path.read_bytes())
        end()
    upload(filesystem, path, inner)

generations._upload = upload_or_end
if where == "before the commit":
    transfer.commit_generation = end
if where == "before the former one is deleted":
    write_object = generations.write_object
    generations.write_object = lambda *arguments: end(write_object(*arguments))
if where == "before the copy is marked":
    commits._sync = lambda path: end() if path.name == "mine" else None
commits.commit_directory(copies.local_path(RUN) / "world", write_two("two"))
"""


@pytest.mark.parametrize(
    ("where", "seen"),
    [
        ("b.bin", "one"),
        ("a.bin", "one"),
        ("before the commit", "one"),
        ("before the former one is deleted", "two"),
        ("before the copy is marked", "two"),
    ],
)
@pytest.mark.parametrize("is_first", [False, True])
def test_a_commit_killed_at_any_point_leaves_one_whole_generation_or_none_and_the_next_clears_its_rest(
    node: Callable[[str], Path], server: S3Server, where: str, seen: str, is_first: bool
) -> None:
    run_dir = node("first")
    (run_dir / "stages").mkdir(parents=True)
    write_json_atomic(run_dir / "stages" / "sft.json", {})  # the run is there, whatever becomes of its world
    if not is_first:
        commit_directory(run_dir / "world", write_two("one"))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where], env=os.environ | {"PYTHONPATH": os.getcwd()}, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    for name in ("second", "first"):  # any other node, and the next process on the same one
        copy = node(name)
        pull_anew(copy)
        if is_first and seen == "one":
            assert not (copy / "world").exists()
        else:
            assert contents(copy / "world") == whole(seen)
    delete_uncommitted(run_dir)
    left = {
        "b.bin": 0,
        "a.bin": 1,
        "before the commit": 2,
        "before the former one is deleted": 2,
        "before the copy is marked": 0,
    }[where]
    num_files = (
        (1 if seen == "one" else 4) if is_first else 4 + left
    )  # beside a committed generation it goes with the next commit
    assert len(server.keys("runs")) == num_files
    commit_directory(node("first") / "world", write_two("three"))
    assert contents(pull(node("third")) / "world") == whole("three")
    assert len(server.keys("runs")) == 4


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("interfere", ["delete one", "shorten one", "another run begins"])
def test_what_another_writer_has_taken_from_an_upload_is_not_committed(
    node: Callable[[str], Path], server: S3Server, monkeypatch: pytest.MonkeyPatch, interfere: str, is_first: bool
) -> None:
    run_dir, commit_generation = node("first"), transfer.commit_generation
    if not is_first:
        commit_directory(run_dir / "world", write_two("one"))

    def interfere_and_commit(folder: Path, generation: str, parts: list[Any]) -> None:
        key = f"deep/mine/world/{generation}/b.bin"
        if interfere == "delete one":
            server.client().delete_object(Bucket="runs", Key=key)
        elif interfere == "shorten one":
            server.put("runs", {key: b"two"})
        elif is_first:
            delete_uncommitted(run_dir)
        else:
            commit_directory(node("second") / "world", write_two("three"))
        commit_generation(folder, generation, parts)

    with monkeypatch.context() as between:
        between.setattr(transfer, "commit_generation", lambda *of: (between.undo(), interfere_and_commit(*of)))
        with pytest.raises(
            StorageError, match=rf"{RUN}/world was not committed: b\.bin, of 2 files .* Another process writes this run"
        ):
            commit_directory(run_dir / "world", write_two("two"))
    copy = pull(node("third")) / "world"
    if is_first:
        assert not copy.exists()
    else:
        assert contents(copy) == whole("three" if interfere == "another run begins" else "one")
    commit_directory(node("first") / "world", write_two("four"))
    assert contents(pull(node("fourth")) / "world") == whole("four")


def test_a_training_state_whose_upload_is_cut_off_leaves_the_last_one_and_training_goes_on_from_it(
    node: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(new_engine(), range(6))
    root, engine = node("first") / "sft" / "state", new_engine()
    train(engine, range(4))
    save_state(engine, root, 4)
    train(engine, range(4, 5))

    def refuse(*_: object) -> None:
        raise OSError("When uploading part: AWS Error NETWORK_CONNECTION")

    with monkeypatch.context() as broken:
        broken.setattr("rm_robust.runs.storage.generations._upload", refuse)
        with pytest.raises(StorageError, match="step-0000005 could not be written: When uploading part"):
            save_state(engine, root, 5)
    root, resumed = node("second") / "sft" / "state", new_engine(seed=1)
    assert committed_steps(root) == [4]
    assert load_state(resumed, root) == 4
    weights = train(resumed, range(4, 6))
    assert all((weights[name] == tensor).all() for name, tensor in expected.items())
    save_state(resumed, root, 6)
    assert committed_steps(root) == [6]
    assert committed_in(root) == ["step-0000006"]


def test_a_role_that_may_not_delete_is_told_so_after_the_state_is_committed(
    node: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, engine = node("first") / "sft" / "state", new_engine()
    save_state(engine, root, 2)

    def refuse(*_: object) -> None:
        raise OSError("When deleting object: AWS Error ACCESS_DENIED")

    monkeypatch.setattr("rm_robust.runs.files.delete_folder", refuse)
    with pytest.raises(
        StorageError,
        match=rf"^{RUN}/sft/state/step-0000002, .* ACCESS_DENIED\. step-0000004 is committed, and the same command",
    ):
        save_state(engine, root, 4)
    assert load_state(new_engine(seed=1), node("second") / "sft" / "state") == 4


def test_what_a_node_has_beyond_the_store_is_gone_at_the_start_of_a_run(node: Callable[[str], Path]) -> None:
    run_dir = node("first")
    commit_directory(run_dir / "world", write_two("one"))
    for name in ("stages/sft.json", "sft/base/config.json", ".world.partial-1/b.bin"):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("{}")
    forget_uncommitted(run_dir)
    assert [path.name for path in run_dir.iterdir() if path.suffix not in (".generation", ".lock")] == ["world"]
    assert contents(run_dir / "world") == whole("one")


def test_a_run_is_claimed_in_the_store_and_another_config_is_refused_on_every_node(
    node: Callable[[str], Path], server: S3Server
) -> None:
    node("first")
    run_dir = choose_run_dir("mine", RUN)
    claim_run_dir(run_dir, PipelineConfig(name="mine"))
    assert RunLayout(run_dir).run_stage("world", lambda: {"num_rows": 3})
    run_dir = node("second")
    claim_run_dir(run_dir, PipelineConfig(name="mine"))
    pull(run_dir)
    assert RunLayout(run_dir).is_done("world")
    (run_dir / "metrics.jsonl").write_text("the run that is under way here has not put it yet")
    with pytest.raises(ConfigError, match=f"^{RUN} holds a run of another config:\n  seed: 0 there, 1 now"):
        claim_run_dir(run_dir, PipelineConfig(name="mine", seed=1))
    assert (run_dir / "metrics.jsonl").exists(), "who is refused leaves the copy alone"
    assert server.keys("runs") == [
        "deep/mine/.config.resolved.json",
        "deep/mine/config.resolved.json",
        "deep/mine/stages/world.json",
    ]
    assert choose_run_dir("mine", "s3://absent/mine") == local_path("s3://absent/mine")
    with pytest.raises(ConfigError, match="The run directory s3://absent/mine cannot be used"):
        claim_run_dir(local_path("s3://absent/mine"), PipelineConfig(name="mine"))


def test_metrics_are_in_the_store_up_to_every_committed_state(node: Callable[[str], Path]) -> None:
    run_dir = node("first")
    with MetricsWriter(run_dir, "sft", 0) as writer:
        writer.write(1, {"sft/loss": 1.0})
        writer.persist()
        writer.write(2, {"sft/loss": 0.5})
        assert [line["step"] for line in read_metrics(pull(node("second")), "sft")] == [1]
    assert [line["step"] for line in read_metrics(pull(node("third")), "sft")] == [1, 2]
    assert list((node("third") / "tensorboard" / "sft").iterdir())


def test_who_only_looks_leaves_the_copies_of_a_run_alone(
    node: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = node("first")
    claim_run_dir(run_dir, PipelineConfig(name="mine"))
    with MetricsWriter(run_dir, "sft", 0, num_steps=3) as writer:
        writer.write(1, {"sft/loss": 1.0})
        writer.persist()
        writer.write(2, {"sft/loss": 0.5})
        assert rm_robust(["status", RUN]) == 0
        assert "step 1 of 3" in capsys.readouterr().out
        with copies_of_ones_own():
            assert local_path(RUN) != run_dir
        writer.write(3, {"sft/loss": 0.2})
    assert [line["step"] for line in read_metrics(pull(node("second")), "sft")] == [1, 2, 3]


def test_a_store_that_goes_away_is_a_storage_error_and_hides_no_other(
    node: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = node("first")

    def refuse(*_: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    def train() -> None:
        with MetricsWriter(run_dir, "sft", 0) as writer:
            writer.write(1, {"sft/loss": 1.0})
            monkeypatch.setattr("rm_robust.runs.storage.transfer.write_object", refuse)
            with pytest.raises(StorageError, match=f"{RUN}/metrics.jsonl cannot be reached: AWS Error"):
                writer.persist()
            raise KeyError("the first error")

    with pytest.raises(KeyError, match="the first error"):
        train()


def test_a_folder_that_is_committed_anew_while_it_is_pulled_is_pulled_anew(
    node: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_directory(node("first") / "world", write_two("one"))
    download, cache, begun = transfer.download, os.environ[CACHE_VARIABLE], []

    def commit_meanwhile(filesystem: object, inner: str, path: Path) -> None:
        if not begun:
            begun.append(path)
            commit_directory(node("first") / "world", write_two("two"))
            node("second")
        download(filesystem, inner, path)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "download", commit_meanwhile)
    assert contents(pull(node("second")) / "world") == whole("two")
    assert cache != os.environ[CACHE_VARIABLE]


def test_a_twin_that_was_put_in_part_is_put_again(node: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = node("first")
    for name in ("checkpoints/sft", "preferences/tokens"):
        commit_directory(run_dir / name, write_two(name))
    for stage in ("sft", "preferences"):
        RunLayout(run_dir).run_stage(stage, dict)
    (run_dir / "metrics.jsonl").write_text("")
    put, names = shared_stages.put_folder, []

    def put_once(written: Path, folder: Path) -> object:
        names.append(folder.name)
        if len(names) > 1:
            raise KeyboardInterrupt
        return put(written, folder)

    with monkeypatch.context() as stopped:
        stopped.setattr(shared_stages, "put_folder", put_once)
        with pytest.raises(KeyboardInterrupt):
            share_stages(run_dir, run_dir / "bt_twin", ["sft", "preferences"])
    share_stages(run_dir, run_dir / "bt_twin", ["sft", "preferences"])
    twin = pull(node("second") / "bt_twin")
    assert contents(twin / "preferences" / "tokens") == whole("preferences/tokens")
    assert RunLayout(twin).is_done("preferences")


def test_a_twin_begins_in_the_store_with_its_siblings_stages(node: Callable[[str], Path]) -> None:
    run_dir = node("first")
    commit_directory(run_dir / "checkpoints" / "sft", write_two("sft"))
    commit_directory(run_dir / "preferences" / "tokens", write_two("tokens"))
    for stage in ("sft", "preferences"):
        RunLayout(run_dir).run_stage(stage, dict)
    (run_dir / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\n{"stage": "rloo", "step": 1}\n')
    share_stages(run_dir, run_dir / "bt_twin", ["sft", "preferences"])
    twin = pull(node("second") / "bt_twin")
    assert contents(twin / "checkpoints" / "sft") == whole("sft")
    assert contents(twin / "preferences" / "tokens") == whole("tokens")
    assert [line["step"] for line in read_metrics(twin, "sft")] == [1]
    assert RunLayout(twin).is_done("preferences")


def test_a_checkpoint_is_verified_from_the_store_and_copied_out_of_it(
    node: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = node("first") / "checkpoints" / "reward_model"
    commit_checkpoint(
        target, write_two("weights"), kind="reward_model", template_sha256="sha256:t", training={"seed": 3}
    )
    assert verify_checkpoint(node("second") / "checkpoints" / "reward_model", "reward_model").training == {"seed": 3}
    assert main([f"{RUN}/checkpoints/reward_model", str(tmp_path / "out")]) == 0
    assert verify_checkpoint(tmp_path / "out", "reward_model").training == {"seed": 3}
    assert main([f"{RUN}/checkpoints/policy", str(tmp_path / "none")]) == 2
    assert "s3://runs/deep/mine/checkpoints/policy is no committed folder" in capsys.readouterr().err


def test_paths_on_a_file_system_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    put_file(tmp_path / "a")
    forget_uncommitted(tmp_path)
    assert pull(tmp_path) == tmp_path
    assert contents(tmp_path) == {"a": "a"}
