"""Kill and resume equals no kill, and only committed states count."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rm_robust.config.shared import OptimizerConfig
from rm_robust.errors import StorageError
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.state import committed_steps, load_state, save_state
from tests.support.full_storage import files_of_at_most


def new_engine(seed: int = 0) -> DdpEngine:
    torch.manual_seed(seed)
    return DdpEngine(
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), optimizer=OptimizerConfig(), device=torch.device("cpu")
    )


def train(engine: DdpEngine, steps: range) -> dict[str, Tensor]:
    for step in steps:
        engine.backward(engine.forward(torch.arange(4.0) + step).square().sum())
        engine.step(0.01)
    return {name: tensor.clone() for name, tensor in engine.full_state_dict().items()}


def test_a_resumed_engine_goes_on_as_if_never_killed(tmp_path: Path) -> None:
    whole = train(new_engine(), range(6))
    first = new_engine()
    train(first, range(4))
    save_state(first, tmp_path / "state", 4)
    resumed = new_engine(seed=1)
    assert load_state(resumed, tmp_path / "state") == 4
    weights = train(resumed, range(4, 6))
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())


def test_weights_without_the_optimisers_state_would_not_do(tmp_path: Path) -> None:
    """The control: the law above is not kept by weights alone."""
    whole = train(new_engine(), range(6))
    weights_only = new_engine(seed=1)
    weights_only.module.load_state_dict(train(new_engine(), range(4)))
    weights = train(weights_only, range(4, 6))
    assert not all(torch.equal(weights[name], tensor) for name, tensor in whole.items())


def test_only_the_newest_state_is_kept_and_nothing_beside_it(tmp_path: Path) -> None:
    engine = new_engine()
    for num_steps in (2, 4, 10):
        train(engine, range(1))
        save_state(engine, tmp_path, num_steps)
        assert committed_steps(tmp_path) == [num_steps]
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000010"]


def test_the_newest_state_is_loaded_when_a_kill_left_two(tmp_path: Path) -> None:
    engine = new_engine()
    save_state(engine, tmp_path, 9)
    (tmp_path / "step-0000009").rename(tmp_path / "older")
    train(engine, range(3))
    save_state(engine, tmp_path, 10)
    (tmp_path / "older").rename(tmp_path / "step-0000009")
    resumed = new_engine(seed=1)
    assert load_state(resumed, tmp_path) == 10
    assert all(
        torch.equal(resumed.full_state_dict()[name], tensor) for name, tensor in engine.full_state_dict().items()
    )


def test_half_written_states_are_not_seen_and_are_removed_by_the_next_commit(tmp_path: Path) -> None:
    class FullDisk(DdpEngine):
        def save(self, folder: Path) -> None:
            (folder / "engine.pt").write_text("half")
            raise OSError("disk full")

    engine = FullDisk(nn.Linear(1, 1), optimizer=OptimizerConfig(), device=torch.device("cpu"))
    with pytest.raises(StorageError, match="disk full"):
        save_state(engine, tmp_path, 3)
    (tmp_path / ".step-0000003.partial-abc").mkdir()
    assert committed_steps(tmp_path) == []
    assert load_state(new_engine(), tmp_path) == 0
    save_state(new_engine(), tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000003"]


def test_there_is_nothing_to_resume_from_where_nothing_was_saved(tmp_path: Path) -> None:
    assert load_state(new_engine(), tmp_path / "nothing") == 0


def test_storage_that_is_full_leaves_the_last_state_to_resume_from(tmp_path: Path) -> None:
    engine = new_engine()
    train(engine, range(2))
    save_state(engine, tmp_path / "state", 2)
    train(engine, range(2, 4))
    with files_of_at_most(1_000), pytest.raises(StorageError, match="could not be written"):
        save_state(engine, tmp_path / "state", 4)
    resumed = new_engine(seed=1)
    assert load_state(resumed, tmp_path / "state") == 2
    whole, weights = train(new_engine(), range(4)), train(resumed, range(2, 4))
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())


def test_an_older_state_that_cannot_be_deleted_is_an_error_that_says_the_new_one_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rmtree = new_engine(), shutil.rmtree
    save_state(engine, tmp_path, 2)
    weights = train(engine, range(2))

    def refuse(path: Path, **options: bool) -> None:
        if Path(path).name == "step-0000002":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        rmtree(path, **options)

    with monkeypatch.context() as without_rights:
        without_rights.setattr(shutil, "rmtree", refuse)
        with pytest.raises(
            StorageError,
            match=rf"^{tmp_path}/step-0000002, an older state, could not be deleted: "
            r".*denied.* step-0000004 is committed",
        ):
            save_state(engine, tmp_path, 4)
    resumed = new_engine(seed=1)
    assert load_state(resumed, tmp_path) == 4
    assert all(torch.equal(weights[name], tensor) for name, tensor in resumed.full_state_dict().items())
    save_state(resumed, tmp_path, 6)
    assert committed_steps(tmp_path) == [6], "both older ones went"
