"""A training step does not know how many workers, micro-batches or ZeRO stages computed it.

Every case runs three steps of the same nine groups from the same weights under SGD (AdamW hides errors of gradient
scale), in two real gloo processes. It is compared with one process that holds all groups in one micro-batch.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from rm_robust.config.objectives import BsrScale, Objective
from rm_robust.config.shared import ComputeConfig, OptimizerConfig, StrategyConfig
from rm_robust.config.training import LoraConfig, RewardModelConfig
from rm_robust.data.records import PreferencePair, TokenGroup
from rm_robust.data.token_files import TokenisedGroup
from rm_robust.models.compute import prepare_for_training
from rm_robust.models.lora import add_adapters
from rm_robust.models.packing import Layout, group_length, lay_out, micro_batches
from rm_robust.models.policy import PackedPolicy
from rm_robust.models.reward_model import PackedRewardModel
from rm_robust.training.engines import create_engine
from rm_robust.training.engines.engine import TrainEngine
from rm_robust.training.reward_model.losses import objective_value
from rm_robust.training.reward_model.step import StepSettings, reward_model_step
from rm_robust.training.reward_model.training import held_out_metrics
from rm_robust.training.sft import sft_step
from rm_robust.training.state import load_state, save_state
from tests.support.tiny_models import random_group, tiny_qwen2_config, tiny_reward_model

CPU = torch.device("cpu")
PAIRS = [random_group(Random(seed), num_completions=2) for seed in range(9)]
HELD_OUT = [
    TokenisedGroup(str(seed), [], random_group(Random(seed), num_completions=3), [1.0, 0.0, 2.0], None)
    for seed in range(20, 27)
]
ONE_MICRO_BATCH, SEVERAL = 10_000, 45
LEARNING_RATES = (0.5, 0.05, 0.05)
"""The first rate is large, so that the weights show the first gradient: 1 ulp of a weight at 1 is 2e-7 of gradient."""
COEFFICIENT = 0.02
BSR = RewardModelConfig(objective=Objective.BATCH_SUM_TO_ZERO, bsr_coefficient=COEFFICIENT, bsr_scale=BsrScale.PAIRS)
UNSCALED_BSR = RewardModelConfig(
    objective=Objective.BATCH_SUM_TO_ZERO, bsr_coefficient=COEFFICIENT * len(PAIRS), bsr_scale=BsrScale.NONE
)
"""BSR with the coefficient that BSR has for all pairs, whatever the number of pairs in the mean."""
BRADLEY_TERRY = RewardModelConfig(objective=Objective.BRADLEY_TERRY)
NO_CLIPPING = 1e6
ADAPTERS = LoraConfig(rank=4, alpha=4)


@dataclass(frozen=True)
class Case:
    """How the groups are spread and trained. `shares` is the number of groups of each rank."""

    strategy: StrategyConfig
    shares: tuple[int, ...]
    max_tokens: int = ONE_MICRO_BATCH
    max_gradient_norm: float = NO_CLIPPING
    objective: RewardModelConfig = BSR
    layout: Layout = Layout.SEGMENTS
    lora: LoraConfig | None = None
    compute: ComputeConfig = ComputeConfig()


@dataclass(frozen=True)
class Outcome:
    """What rank 0 saw.

    Loss and gradient norm of each step, weights before the first step and after every step, figures of held-out
    prompts, and the largest difference that a kill and resume made to any weight.
    """

    losses: list[float]
    gradient_norms: list[float]
    weights: list[dict[str, Tensor]]
    held_out: list[dict[str, float]]
    resume_gap: float


StepFunction = Callable[[TrainEngine, nn.Module, Case, list[TokenGroup]], float]


def settings_of(case: Case) -> StepSettings:
    return StepSettings(case.objective, case.max_tokens, pad_id=0)


def as_pairs(groups: list[TokenGroup]) -> list[PreferencePair]:
    """Give the pairs different weights, so that a pair with another pair's weight fails the test."""
    return [PreferencePair(group, weight=float(len(group.prompt_ids))) for group in groups]


def exact_step(engine: TrainEngine, module: nn.Module, case: Case, own: list[TokenGroup]) -> float:
    assert isinstance(module, PackedRewardModel)
    return reward_model_step(engine, as_pairs(own), settings_of(case), model=module, device=CPU)["reward_model/loss"]


def local_mean_step(engine: TrainEngine, module: nn.Module, case: Case, own: list[TokenGroup]) -> float:
    """Run the negative control: every rank takes the penalty on its own mean, and gradients are averaged as usual."""
    scores_N = engine.forward(lay_out(own, Layout.SEGMENTS, pad_id=0)).scores_N
    value = objective_value(scores_N.view(-1, 2), UNSCALED_BSR)
    engine.backward((scores_N * value.gradient_B2.flatten()).sum() * len(own) / len(PAIRS))
    return value.loss


def demonstration_step(engine: TrainEngine, module: nn.Module, case: Case, own: list[TokenGroup]) -> float:
    assert isinstance(module, PackedPolicy)
    return sft_step(engine, own, policy=module, pad_id=0, max_tokens=case.max_tokens, device=CPU)["sft/loss"]


def micro_mean_step(engine: TrainEngine, module: nn.Module, case: Case, own: list[TokenGroup]) -> float:
    """Run the other control: as usual with accumulation, every micro-batch takes the penalty on its own mean."""
    bins = micro_batches(own, Layout.SEGMENTS, case.max_tokens)
    for number, members in enumerate(bins):
        with engine.micro_batch(is_last=number == len(bins) - 1):
            scores_N = engine.forward(lay_out([own[i] for i in members], Layout.SEGMENTS, pad_id=0)).scores_N
            value = objective_value(scores_N.view(-1, 2), UNSCALED_BSR)
            engine.backward((scores_N * value.gradient_B2.flatten()).sum() * len(members) / len(PAIRS))
    return value.loss


def new_module(step: StepFunction, case: Case) -> nn.Module:
    if step is demonstration_step:
        torch.manual_seed(0)
        return PackedPolicy(
            Qwen2ForCausalLM(tiny_qwen2_config(tie_word_embeddings=True)), Layout.SEGMENTS, temperature=1.0
        )
    model = tiny_reward_model().eval()
    if case.lora:
        torch.manual_seed(0)
        add_adapters(model, case.lora)
    prepare_for_training(model, case.compute)
    return PackedRewardModel(model, case.layout, case.compute)


def new_engine(module: nn.Module, case: Case, *, kind: str) -> TrainEngine:
    optimizer = OptimizerConfig.model_validate({"kind": kind, "max_gradient_norm": case.max_gradient_norm})
    return create_engine(module, strategy=case.strategy, optimizer=optimizer, device=CPU)


def whole_weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.full_state_dict().items()}


def run_case(case: Case, step: StepFunction, *, state_dir: Path | None = None) -> Outcome:
    module = new_module(step, case)
    engine = new_engine(module, case, kind="sgd")
    start = sum(case.shares[: engine.rank])
    own = PAIRS[start : start + case.shares[engine.rank]]
    losses, norms, weights = [], [], [whole_weights(engine)]
    for learning_rate in LEARNING_RATES:
        losses.append(step(engine, module, case, own))
        norms.append(engine.step(learning_rate))
        weights.append(whole_weights(engine))
    held_out: list[dict[str, float]] = []
    if isinstance(module, PackedRewardModel):
        held_out = [
            held_out_metrics(engine, module, HELD_OUT[:count], settings_of(case), device=CPU)
            for count in (1, len(HELD_OUT))
        ]
    return Outcome(losses, norms, weights, held_out, resume_gap(case, own, state_dir) if state_dir else 0.0)


def resume_gap(case: Case, own: list[TokenGroup], state_dir: Path) -> float:
    """Compare three AdamW steps without a break with three that are killed and resumed after two."""

    def train(engine: TrainEngine, module: nn.Module, num_steps: int) -> None:
        for _ in range(num_steps):
            exact_step(engine, module, case, own)
            engine.step(1e-3)

    module, restarted = new_module(exact_step, case), new_module(exact_step, case)
    engine = new_engine(module, case, kind="adamw")
    train(engine, module, 2)
    save_state(engine, state_dir, 2)
    train(engine, module, 1)
    resumed = new_engine(restarted, case, kind="adamw")
    assert load_state(resumed, state_dir) == 2
    train(resumed, restarted, 1)
    expected, actual = whole_weights(engine), whole_weights(resumed)
    return max((float((actual[name] - tensor).abs().max()) for name, tensor in expected.items()), default=0.0)


def _worker(rank: int, folder: Path, cases: dict[str, tuple[Case, StepFunction]]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=240)
    )
    for name, (case, step) in cases.items():
        outcome = run_case(case, step, state_dir=folder / f"{name}-state" if name.endswith("even") else None)
        if rank == 0:
            torch.save(outcome, folder / f"{name}.pt")
    dist.destroy_process_group()
    # This exit skips Python's finalisation. In it, a torch thread that still frees a tensor waits for the interpreter's
    # lock, is unwound through C++ and aborts the process (seen once in CI; https://github.com/pytorch/pytorch/pull/179291).
    # All outcomes are on disk.
    os._exit(0)


def cases_of(strategy: StrategyConfig) -> dict[str, tuple[Case, StepFunction]]:
    return {
        "even": (Case(strategy, (4, 5)), exact_step),
        "micro": (Case(strategy, (8, 1), max_tokens=SEVERAL), exact_step),
        "sum over pairs": (Case(strategy, (8, 1), max_tokens=SEVERAL, objective=BRADLEY_TERRY), exact_step),
        "clipped": (Case(strategy, (5, 4), max_gradient_norm=0.1), exact_step),
        "padded": (Case(strategy, (5, 4), max_tokens=SEVERAL, layout=Layout.PADDED), exact_step),
        "adapters": (
            Case(strategy, (4, 5), lora=ADAPTERS, compute=ComputeConfig(gradient_checkpointing=True)),
            exact_step,
        ),
        "sft": (Case(strategy, (8, 1), max_tokens=SEVERAL), demonstration_step),
    }


DDP = StrategyConfig()
NAMES = list(cases_of(DDP))
Outcomes = Callable[[str], Outcome]


def run_in_two_processes(folder: Path, cases: dict[str, tuple[Case, StepFunction]]) -> Outcomes:
    mp.spawn(_worker, args=(folder, cases), nprocs=2)

    def outcome(name: str) -> Outcome:
        loaded: Outcome = torch.load(folder / f"{name}.pt", weights_only=False)
        return loaded

    return outcome


@pytest.fixture(scope="module")
def single() -> Outcomes:
    """Train in one process with all groups in one micro-batch, which every case must equal."""
    alone = Case(DDP, (len(PAIRS),))
    free = run_case(alone, exact_step)
    bradley_terry = run_case(replace(alone, objective=BRADLEY_TERRY), exact_step)
    others = {
        "sum over pairs": bradley_terry,
        "adapters": run_case(replace(alone, lora=ADAPTERS), exact_step),
        "clipped": run_case(replace(alone, max_gradient_norm=0.1), exact_step),
        "padded": run_case(replace(alone, layout=Layout.PADDED), exact_step),  # layouts are compared in test_packing.py
        "sft": run_case(alone, demonstration_step),
    }
    return lambda name: others.get(name, free)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    more = {
        "uneven": (Case(DDP, (7, 2)), exact_step),
        "local": (Case(DDP, (4, 5)), local_mean_step),
        "micro mean": (Case(DDP, (4, 5), max_tokens=SEVERAL), micro_mean_step),
    }
    return run_in_two_processes(tmp_path_factory.mktemp("ddp"), cases_of(DDP) | more)


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    strategy = StrategyConfig(kind="fsdp2")
    more = {
        "uneven": (Case(strategy, (7, 2)), exact_step),
        "offloaded": (Case(StrategyConfig(kind="fsdp2", cpu_offload=True), (4, 5)), exact_step),
        "local": (Case(strategy, (4, 5)), local_mean_step),
    }
    return run_in_two_processes(tmp_path_factory.mktemp("fsdp2"), cases_of(strategy) | more)


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    strategies = {
        stage: StrategyConfig.model_validate({"kind": "deepspeed", "zero_stage": stage}) for stage in (1, 2, 3)
    }
    cases = {
        f"zero{stage}-{name}": case
        for stage, strategy in strategies.items()
        for name, case in cases_of(strategy).items()
    }
    return run_in_two_processes(tmp_path_factory.mktemp("deepspeed"), cases)


def assert_equal(actual: Outcome, expected: Outcome) -> None:
    assert actual.losses == pytest.approx(expected.losses, abs=1e-6)
    assert actual.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)
    for actual_figures, expected_figures in zip(actual.held_out, expected.held_out, strict=True):
        assert actual_figures == pytest.approx(expected_figures, rel=1e-4, abs=1e-5)
    for weights, expected_weights in zip(actual.weights, expected.weights, strict=True):
        assert weights.keys() == expected_weights.keys()
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(
                weights[name], tensor, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
    for name, gradient in first_gradients(expected).items():
        torch.testing.assert_close(
            first_gradients(actual)[name],
            gradient,
            atol=1e-6,
            rtol=0,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )

    assert gradient_distance(actual, expected) < 1e-5


def gradient_distance(actual: Outcome, expected: Outcome) -> float:
    """Return the length of the difference of the first step's gradients over the length of the expected gradient."""
    gradient, expected_gradient = (
        torch.cat([gradient.flatten() for gradient in first_gradients(o).values()]).double() for o in (actual, expected)
    )
    return float((gradient - expected_gradient).norm() / expected_gradient.norm())


def first_gradients(outcome: Outcome) -> dict[str, Tensor]:
    before, after = outcome.weights[:2]
    return {name: (tensor - after[name]) / LEARNING_RATES[0] for name, tensor in before.items()}


def test_the_cases_have_ranks_with_several_micro_batches_beside_ranks_with_one() -> None:
    lengths = [group_length(pair) for pair in PAIRS]
    assert sum(lengths[:8]) > 2 * SEVERAL
    assert lengths[8] < SEVERAL


def test_gradients_are_large_enough_to_be_compared(single: Outcomes) -> None:
    for name in ("free", "sft"):
        assert min(single(name).gradient_norms) > 0.5
        assert single(name).losses[-1] < single(name).losses[0]


@pytest.mark.parametrize("name", [*NAMES, "uneven"])
def test_two_ddp_workers_equal_one(ddp: Outcomes, single: Outcomes, name: str) -> None:
    assert_equal(ddp(name), single(name))


@pytest.mark.parametrize("name", [*NAMES, "uneven", "offloaded"])
def test_two_fsdp2_workers_equal_one(fsdp2: Outcomes, single: Outcomes, name: str) -> None:
    assert_equal(fsdp2(name), single(name))


@pytest.mark.parametrize(("engines", "name"), [("ddp", "local"), ("ddp", "micro mean"), ("fsdp2", "local")])
def test_a_mean_over_a_rank_or_a_micro_batch_does_not_equal_one_worker(
    request: pytest.FixtureRequest, single: Outcomes, engines: str, name: str
) -> None:
    outcome = request.getfixturevalue(engines)(name)
    with pytest.raises(AssertionError):
        assert_equal(outcome, single("free"))
    assert gradient_distance(outcome, single("free")) > 1e-2


def test_ddp_killed_and_resumed_equals_not_killed(ddp: Outcomes) -> None:
    assert ddp("even").resume_gap == 0


def test_fsdp2_killed_and_resumed_equals_not_killed(fsdp2: Outcomes) -> None:
    assert fsdp2("even").resume_gap == 0


@pytest.mark.slow
@pytest.mark.timeout(600)  # DeepSpeed compiles its communication operators once a machine
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_two_deepspeed_workers_equal_one(deepspeed: Outcomes, single: Outcomes, zero_stage: int, name: str) -> None:
    assert_equal(deepspeed(f"zero{zero_stage}-{name}"), single(name))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_deepspeed_killed_and_resumed_equals_not_killed(deepspeed: Outcomes, zero_stage: int) -> None:
    assert deepspeed(f"zero{zero_stage}-even").resume_gap == 0
