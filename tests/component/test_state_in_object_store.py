"""Two ranks that share no disk save a training state to an object store, and resume from it.

Each rank uploads its part, rank 0 commits all parts, and both go on from them on other machines. The store is moto's S3
server. A machine is a cache folder of its own: machine0 and machine1 before the resume, other0 and other1 after it.
"""

import os
from datetime import timedelta
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rm_robust.config.objectives import Objective
from rm_robust.config.shared import OptimizerConfig, StrategyConfig
from rm_robust.config.training import RewardModelConfig
from rm_robust.data.records import PreferencePair
from rm_robust.models.packing import Layout
from rm_robust.models.reward_model import PackedRewardModel
from rm_robust.runs.storage.copies import CACHE_VARIABLE, local_path
from rm_robust.training.engines import create_engine
from rm_robust.training.engines.engine import TrainEngine
from rm_robust.training.reward_model.step import StepSettings, reward_model_step
from rm_robust.training.state import committed_steps, load_state, save_state
from tests.support.s3_server import s3_server
from tests.support.tiny_models import random_group, tiny_reward_model

CPU = torch.device("cpu")
ROOT = "s3://runs/mine/reward_model/state"
PAIRS = [PreferencePair(random_group(Random(seed), num_completions=2)) for seed in range(6)]
STRATEGIES = {
    "ddp": StrategyConfig(),
    "fsdp2": StrategyConfig(kind="fsdp2"),
    "zero1": StrategyConfig(kind="deepspeed", zero_stage=1),
    "zero3": StrategyConfig(kind="deepspeed", zero_stage=3),
}


def new_engine(strategy: StrategyConfig) -> tuple[TrainEngine, PackedRewardModel]:
    module = PackedRewardModel(tiny_reward_model().eval(), Layout.SEGMENTS)
    return create_engine(module, strategy=strategy, optimizer=OptimizerConfig(), device=CPU), module


def train(engine: TrainEngine, module: PackedRewardModel, num_steps: int) -> dict[str, Tensor]:
    objective = RewardModelConfig(objective=Objective.BATCH_SUM_TO_ZERO, bsr_coefficient=0.01)
    settings = StepSettings(objective, 10_000, pad_id=0)
    for _ in range(num_steps):
        reward_model_step(engine, PAIRS[engine.rank :: 2], settings, model=module, device=CPU)
        engine.step(1e-3)
    return engine.full_state_dict()


def _worker(rank: int, folder: Path, strategy: StrategyConfig) -> None:
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
    os.environ[CACHE_VARIABLE] = str(folder / f"machine{rank}")
    engine, module = new_engine(strategy)
    for num_done in (1, 2):  # the second state replaces the first
        train(engine, module, 1)
        save_state(engine, local_path(ROOT), num_done)
    expected = train(engine, module, 1)
    os.environ[CACHE_VARIABLE] = str(folder / f"other{rank}")
    root = local_path(ROOT)
    assert committed_steps(root) == [2]
    resumed, its_module = new_engine(strategy)
    assert load_state(resumed, root) == 2
    found = train(resumed, its_module, 1)
    gap = max((float((found[name] - tensor).abs().max()) for name, tensor in expected.items()), default=0.0)
    left = [path for path in (folder / f"other{rank}").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    torch.save((len(expected), gap, left), folder / f"outcome{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # skips Python's finalisation; test_step_exactness.py says why


@pytest.mark.timeout(600)  # DeepSpeed compiles its communication operators once a machine
@pytest.mark.parametrize(
    "name",
    ["ddp", "fsdp2", pytest.param("zero1", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)],
)
def test_two_ranks_without_a_common_disk_go_on_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with s3_server() as server:
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
        server.put("runs", {})
        mp.spawn(_worker, args=(tmp_path, STRATEGIES[name]), nprocs=2)
        num_weights, gap, left = torch.load(tmp_path / "outcome0.pt", weights_only=False)
        assert num_weights > 10
        assert gap == 0
        assert left == [], "a state that was loaded is not kept on every machine"
        steps = {key.split("/")[3] for key in server.keys("runs")}
    assert steps == {"step-0000002"}
