"""The objective of a step does not know how many workers, micro-batches or ZeRO stages computed it.

Every case runs three steps of the same nine pairs from the same weights under SGD (AdamW hides errors of gradient scale), in two real
gloo processes, and is compared with one process that holds all pairs in one micro-batch.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rm_robust.config import OptimizerConfig, StrategyConfig
from rm_robust.packing import Layout, group_length, lay_out
from rm_robust.records import TokenGroup
from rm_robust.reward_model.losses import BsrScale, Objective, objective_value
from rm_robust.reward_model.model import PackedRewardModel
from rm_robust.reward_model.step import StepSettings, reward_model_step
from rm_robust.train_engine import TrainEngine, create_engine
from rm_robust.training_state import load_state, save_state
from tests.tiny_models import random_group, tiny_reward_model

CPU = torch.device("cpu")
PAIRS = [random_group(Random(seed), num_completions=2) for seed in range(9)]
ONE_MICRO_BATCH, SEVERAL = 10_000, 45
LEARNING_RATES = (0.5, 0.05, 0.05)
"""The first is large, so that the first step's gradient can be read off the weights: 1 ulp of a weight at 1 is 2e-7 of gradient."""
COEFFICIENT = 0.02
NO_CLIPPING = 1e6
SPAWN_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Case:
    """How the pairs are spread. `shares`: pairs of each rank."""

    strategy: StrategyConfig
    shares: tuple[int, ...]
    max_tokens: int = ONE_MICRO_BATCH
    max_gradient_norm: float = NO_CLIPPING
    local_mean: bool = False


@dataclass(frozen=True)
class Outcome:
    """What rank 0 saw: per step loss and gradient norm; weights after the first and the last step."""

    losses: list[float]
    gradient_norms: list[float]
    first_weights: dict[str, Tensor]
    last_weights: dict[str, Tensor]


def new_engine(case: Case, *, kind: str = "sgd") -> tuple[TrainEngine, PackedRewardModel]:
    packed = PackedRewardModel(tiny_reward_model(), Layout.SEGMENTS)
    optimizer = OptimizerConfig.model_validate({"kind": kind, "max_gradient_norm": case.max_gradient_norm})
    return create_engine(packed, strategy=case.strategy, optimizer=optimizer, device=CPU), packed


def step(engine: TrainEngine, packed: PackedRewardModel, case: Case, pairs: list[TokenGroup]) -> float:
    settings = StepSettings(Objective.BATCH_SUM_TO_ZERO, COEFFICIENT, BsrScale.PAIRS, case.max_tokens, pad_id=0)
    if case.local_mean:
        return local_mean_step(engine, packed, settings, pairs)
    return reward_model_step(engine, pairs, settings, model=packed, device=CPU)["reward_model/loss"]


def local_mean_step(engine: TrainEngine, packed: PackedRewardModel, settings: StepSettings, pairs: list[TokenGroup]) -> float:
    """The negative control: every rank takes the penalty on its own mean, and gradients are averaged as usual."""
    scores_N = engine.forward(lay_out(pairs, packed.layout, pad_id=0)).scores_N
    value = objective_value(scores_N.view(-1, 2), objective=settings.objective, bsr_coefficient=COEFFICIENT * len(PAIRS), bsr_scale=BsrScale.NONE)
    engine.backward((scores_N * value.gradient_B2.flatten()).sum() * len(pairs) / len(PAIRS))
    return value.loss


def run_case(case: Case) -> Outcome:
    engine, packed = new_engine(case)
    start = sum(case.shares[: engine.rank])
    pairs = PAIRS[start : start + case.shares[engine.rank]]
    losses, norms, weights = [], [], []
    for learning_rate in LEARNING_RATES:
        losses.append(step(engine, packed, case, pairs))
        norms.append(engine.step(learning_rate))
        weights.append({name: tensor.clone() for name, tensor in engine.full_state_dict().items()})
    return Outcome(losses, norms, weights[0], weights[-1])


def resume_gap(case: Case, folder: Path) -> float:
    """Largest difference of any weight after three AdamW steps between going on and being killed after two. On rank 0."""
    engine, packed = new_engine(case, kind="adamw")
    start = sum(case.shares[: engine.rank])
    pairs = PAIRS[start : start + case.shares[engine.rank]]
    for number in range(3):
        step(engine, packed, case, pairs)
        engine.step(1e-3)
        if number == 1:
            save_state(engine, folder, 2)
    resumed, packed = new_engine(case, kind="adamw")
    assert load_state(resumed, folder) == 2
    step(resumed, packed, case, pairs)
    resumed.step(1e-3)
    expected, actual = engine.full_state_dict(), resumed.full_state_dict()
    return max((float((actual[name] - tensor).abs().max()) for name, tensor in expected.items()), default=0.0)


def _worker(rank: int, folder: Path, cases: dict[str, Case]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=SPAWN_TIMEOUT)
    for name, case in cases.items():
        outcome = run_case(case)
        gap = resume_gap(case, folder / f"{name}-state") if name.endswith("even") else 0.0
        if rank == 0:
            torch.save((outcome, gap), folder / f"{name}.pt")
    dist.destroy_process_group()


def run_in_two_processes(folder: Path, cases: dict[str, Case]) -> Callable[[str], tuple[Outcome, float]]:
    mp.spawn(_worker, args=(folder, cases), nprocs=2)
    return lambda name: torch.load(folder / f"{name}.pt", weights_only=False)


def cases_of(strategy: StrategyConfig) -> dict[str, Case]:
    return {
        "even": Case(strategy, (4, 5)),
        "micro": Case(strategy, (8, 1), max_tokens=SEVERAL),
        "clipped": Case(strategy, (5, 4), max_gradient_norm=0.1),
    }


NAMES = list(cases_of(StrategyConfig()))


@pytest.fixture(scope="module")
def single() -> dict[str, Outcome]:
    """One process, one micro-batch, all pairs: what every case must equal."""
    return {norm: run_case(Case(StrategyConfig(), (len(PAIRS),), max_gradient_norm=value)) for norm, value in (("free", NO_CLIPPING), ("clipped", 0.1))}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, float]]:
    ddp = StrategyConfig()
    cases = {**cases_of(ddp), "uneven": Case(ddp, (7, 2)), "local": Case(ddp, (4, 5), local_mean=True)}
    return run_in_two_processes(tmp_path_factory.mktemp("ddp"), cases)


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, float]]:
    stages: dict[str, Case] = {}
    for zero_stage in (1, 2, 3):
        strategy = StrategyConfig.model_validate({"kind": "deepspeed", "zero_stage": zero_stage})
        stages |= {f"zero{zero_stage}-{name}": case for name, case in cases_of(strategy).items()}
    return run_in_two_processes(tmp_path_factory.mktemp("deepspeed"), stages)


def assert_equal(actual: Outcome, expected: Outcome) -> None:
    assert actual.losses == pytest.approx(expected.losses, abs=1e-6)
    assert actual.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)
    initial = PackedRewardModel(tiny_reward_model(), Layout.SEGMENTS).state_dict()
    assert actual.first_weights.keys() == expected.first_weights.keys() == initial.keys()
    for name, before in initial.items():
        expected_gradient = (before - expected.first_weights[name]) / LEARNING_RATES[0]
        gradient = (before - actual.first_weights[name]) / LEARNING_RATES[0]
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=0, msg=lambda text, name=name: f"gradient of {name}: {text}")
        torch.testing.assert_close(actual.last_weights[name], expected.last_weights[name], atol=1e-6, rtol=0)


def test_the_cases_cover_unequal_numbers_of_micro_batches() -> None:
    assert sum(group_length(pair) for pair in PAIRS[:8]) > 2 * SEVERAL > 0 < group_length(PAIRS[8]) < SEVERAL


def test_gradients_are_large_enough_to_be_compared(single: dict[str, Outcome]) -> None:
    assert min(single["free"].gradient_norms) > 0.5
    assert single["free"].losses[0] > single["free"].losses[-1]


@pytest.mark.parametrize("name", [*NAMES, "uneven"])
def test_two_ddp_workers_equal_one(ddp: Callable[[str], tuple[Outcome, float]], single: dict[str, Outcome], name: str) -> None:
    assert_equal(ddp(name)[0], single["clipped" if name == "clipped" else "free"])


def test_a_local_mean_does_not_equal_one_worker(ddp: Callable[[str], tuple[Outcome, float]], single: dict[str, Outcome]) -> None:
    with pytest.raises(AssertionError):
        assert_equal(ddp("local")[0], single["free"])
    gap = max(float((ddp("local")[0].first_weights[name] - tensor).abs().max()) for name, tensor in single["free"].first_weights.items())
    assert gap / LEARNING_RATES[0] > 1e-2


def test_ddp_killed_and_resumed_equals_not_killed(ddp: Callable[[str], tuple[Outcome, float]]) -> None:
    assert ddp("even")[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_two_deepspeed_workers_equal_one(deepspeed: Callable[[str], tuple[Outcome, float]], single: dict[str, Outcome], zero_stage: int, name: str) -> None:
    assert_equal(deepspeed(f"zero{zero_stage}-{name}")[0], single["clipped" if name == "clipped" else "free"])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_deepspeed_killed_and_resumed_equals_not_killed(deepspeed: Callable[[str], tuple[Outcome, float]], zero_stage: int) -> None:
    assert deepspeed(f"zero{zero_stage}-even")[1] == 0
