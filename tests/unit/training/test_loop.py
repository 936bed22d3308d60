"""The order of the data, and when the loop calls what. `run_loop` runs with a real engine on a module of one weight."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rm_robust.config.shared import OptimizerConfig
from rm_robust.runs.metrics import read_metrics
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.engines.engine import learning_rate_at
from rm_robust.training.loop import LoopSettings, batch_indices, rank_share, run_loop, steps_in

sizes = st.tuples(st.integers(1, 30), st.integers(1, 40))


@given(size=sizes, seed=st.integers(0, 5))
def test_every_batch_is_full_and_every_epoch_is_a_permutation(size: tuple[int, int], seed: int) -> None:
    num_rows, batch_size = size
    num_steps = -(-3 * num_rows // batch_size)
    batches = [batch_indices(step, num_rows=num_rows, batch_size=batch_size, seed=seed) for step in range(num_steps)]
    assert {len(batch) for batch in batches} == {batch_size}
    order = [index for batch in batches for index in batch]
    for epoch in range(3):
        assert sorted(order[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_epochs_and_seeds_give_different_orders_and_the_same_step_the_same_batch() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return batch_indices(number, num_rows=50, batch_size=50, seed=seed)

    assert epoch(0, 1) == epoch(0, 1)
    assert len({tuple(epoch(number, seed)) for number in range(3) for seed in range(3)}) == 9


@given(num_rows=st.integers(0, 40), world_size=st.integers(1, 5))
def test_the_ranks_shares_make_up_the_batch_and_differ_by_at_most_one_row(num_rows: int, world_size: int) -> None:
    shares = [rank_share(list(range(num_rows)), rank=rank, world_size=world_size) for rank in range(world_size)]
    assert Counter(index for share in shares for index in share) == Counter(range(num_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "num_epochs", "expected"),
    [(10, 5, 1, 2), (11, 5, 1, 3), (10, 5, 0.5, 1), (3, 100, 1, 1), (10, 4, 3, 8)],
)
def test_steps_cover_the_epochs_and_are_at_least_one(
    num_rows: int, batch_size: int, num_epochs: float, expected: int
) -> None:
    assert steps_in(num_rows, batch_size, num_epochs) == expected


OPTIMIZER = OptimizerConfig(kind="sgd", learning_rate=0.1, max_gradient_norm=100)


def run(
    run_dir: Path, *, first_step: int, num_steps: int = 5, fail_at: int | None = None, reclaimed_from: int | None = None
) -> tuple[list[int], list[int], DdpEngine]:
    """Run the loop; return the trained steps, the committed numbers of steps and the engine.

    Step i has the gradient i + 1 on the one weight.
    """
    trained: list[int] = []
    committed: list[int] = []
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    engine = DdpEngine(module, optimizer=OPTIMIZER, device=torch.device("cpu"))

    def train_step(step: int) -> dict[str, float]:
        if step == fail_at:
            raise OSError("killed")
        trained.append(step)
        engine.backward(engine.forward(torch.tensor([step + 1.0])).sum())
        return {"sft/loss": 1.0, "sft/num_tokens": 10.0}

    settings = LoopSettings("sft", num_steps, OPTIMIZER, checkpoint_every_steps=2, logged_keys=("sft/loss",))

    def evaluate(step: int) -> dict[str, float]:
        return {"sft/held_out": 0.5} if step == 3 else {}

    run_loop(
        engine,
        settings,
        first_step=first_step,
        run_dir=run_dir,
        train_step=train_step,
        evaluate=evaluate,
        commit=committed.append,
        is_reclaimed=lambda: reclaimed_from is not None and len(trained) >= reclaimed_from,
    )
    return trained, committed, engine


def test_the_loop_trains_every_step_and_commits_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    trained, committed, engine = run(tmp_path, first_step=0)
    assert (trained, committed) == ([0, 1, 2, 3, 4], [2, 4, 5])
    moved = sum(learning_rate_at(step, 5, OPTIMIZER) * (step + 1) for step in range(5))
    assert engine.full_state_dict()["weight"].item() == pytest.approx(-moved)


def test_every_step_logs_its_metrics_rate_norm_time_and_throughput(tmp_path: Path) -> None:
    run(tmp_path, first_step=0)
    lines = read_metrics(tmp_path, "sft")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["sft/gradient_norm"] for line in lines] == pytest.approx([1, 2, 3, 4, 5])
    assert [line["sft/learning_rate"] for line in lines] == pytest.approx(
        [learning_rate_at(step, 5, OPTIMIZER) for step in range(5)]
    )
    assert ["sft/held_out" in line for line in lines] == [False, False, True, False, False]
    for line in lines:
        assert float(line["throughput/tokens_per_s"]) * float(line["time/step_s"]) == pytest.approx(10)


def test_a_resumed_loop_goes_on_at_its_step_and_no_step_is_logged_twice(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="killed"):
        run(tmp_path, first_step=0, fail_at=3)
    trained, committed, _ = run(tmp_path, first_step=2)
    assert (trained, committed) == ([2, 3, 4], [4, 5])
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_machine_about_to_be_taken_away_commits_once_and_trains_on(tmp_path: Path) -> None:
    trained, committed, _ = run(tmp_path, first_step=0, reclaimed_from=3)
    assert (trained, committed) == ([0, 1, 2, 3, 4], [2, 3, 4, 5])
    assert run(tmp_path / "unasked", first_step=0)[1] == [2, 4, 5]


def test_a_loop_resumed_at_its_end_does_nothing(tmp_path: Path) -> None:
    run(tmp_path, first_step=0)
    assert run(tmp_path, first_step=5)[:2] == ([], [])


def test_a_stage_that_gets_more_steps_goes_on_and_keeps_the_warm_up_that_was_planned(tmp_path: Path) -> None:
    """Four steps warm up over three of them; of eight steps, six would warm up."""
    optimizer = OptimizerConfig(
        kind="sgd", learning_rate=0.1, max_gradient_norm=100, schedule="constant", warmup_fraction=0.75
    )
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    engine = DdpEngine(module, optimizer=optimizer, device=torch.device("cpu"))

    def train_step(step: int) -> dict[str, float]:
        module.weight.grad = torch.ones(1, 1)
        return {"sft/num_tokens": 1}

    for first_step, num_steps in ((0, 4), (4, 8)):
        run_loop(
            engine,
            LoopSettings("sft", num_steps, optimizer, 10, ()),
            first_step=first_step,
            run_dir=tmp_path,
            train_step=train_step,
            evaluate=None,
            commit=lambda step: None,
        )
    lines = read_metrics(tmp_path, "sft")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["sft/learning_rate"] for line in lines] == pytest.approx([0.1 / 3, 0.2 / 3, *[0.1] * 6])
    assert float(module.weight) == pytest.approx(-0.7)
