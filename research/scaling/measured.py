"""What runs on a machine took, beside what the formulas say of them from that machine's few calibrated rates. `research/bench/scaling.py` writes the file.

The rates are measured apart from the runs: a matrix product, an addition of long vectors, a gated activation, a transposed copy, a chain of tiny modules,
attention over short texts, and steps and a weight update of an engine with another, smaller model. None is fitted to a line of the table.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from research.scaling.hardware import Hardware
from research.scaling.memory import MicroBatch, Trained, trainer_memory
from research.scaling.plans import Lengths, TrainingPlan, reward_model_plan, rloo_plan, sft_plan
from research.scaling.publication import shared_memory_update
from research.scaling.shapes import ModelShape, shape_of_config
from rm_robust.config.loading import load_config
from rm_robust.config.shared import ComputeConfig, Section, StrategyConfig
from rm_robust.config.training import ModelConfig

AGREEMENT_FACTOR = 2.0
"""A prediction within it, either way, agrees."""


class Calibration(Section):
    """Rates of one process with so many threads."""

    num_threads: int = Field(ge=1)
    matmul_flops_per_s: float = Field(gt=0)
    """float32, of matrices as large as a tiny model's."""
    memory_bytes_per_s: float = Field(gt=0)
    """Read and written by an addition of vectors that no cache holds."""
    activation_bytes_per_s: float = Field(gt=0)
    """The same of a gated activation and its gradient, of vectors as large as a tiny model's."""
    reorder_bytes_per_s: float = Field(gt=0)
    """Read and written by a copy of a transposed matrix."""
    kernel_s: float = Field(gt=0)
    """A module of one operator on two numbers, or its gradient."""
    attention_call_s: tuple[float, float]
    """Segment attention on texts that fill no block of its kernel, forward and backward, by operator that it calls."""


class EngineCalibration(Section):
    """Of a vLLM engine with the policy of 0.3 M parameters, which none of the lines is about."""

    step_s: float = Field(ge=0)
    """A decoding step of no sequence."""
    token_s: float = Field(ge=0)
    """What each sequence adds to it."""
    completion_s: float = Field(ge=0)
    """What a completion costs once, of whatever length, until it is where it was asked for."""
    update_s: float = Field(ge=0)
    """A weight update, loaded."""
    probe_s: float = Field(ge=0)
    """And from there until it is confirmed."""


class TrainingRun(Section):
    """Steps of a config, medians."""

    name: str
    kind: Literal["reward_model_step", "sft_step", "rloo_generate", "rloo_measure", "rloo_update"]
    config: str
    """Below the repository."""
    overrides: tuple[str, ...] = ()
    """As `--set` has them: what the run changes of the config."""
    num_threads: int = Field(ge=1)
    """Of the process at work."""
    vocab_size: int = Field(ge=1)
    prompt_tokens: float = Field(gt=0)
    completion_tokens: float = Field(gt=0)
    measured: float = Field(gt=0)
    """Seconds."""


class MemoryRun(Section):
    """Peak resident memory of a trainer above what its process held before."""

    name: str
    model: ModelConfig
    num_tokens: float = Field(gt=0)
    """Of a micro-batch."""
    num_scored: float = Field(gt=0)
    """Tokens of them whose score is read."""
    includes_states: bool
    """False where the process had made a step already (research/bench/memory.py): weights, gradients and moments were part of its peak."""
    measured: float = Field(gt=0)
    """MiB."""


class UpdateRun(Section):
    """Weight updates of one engine beside the trainer, medians."""

    name: str
    model: ModelConfig
    kind: Literal["loaded", "confirmed"]
    measured: float = Field(gt=0)
    """Seconds."""


class Measurements(Section):
    """One machine's."""

    machine: str
    source: str
    """How the figures came about."""
    is_calibrated: bool
    """False: the rates below are nominal, not measured."""
    calibrations: list[Calibration]
    engine: EngineCalibration
    training: list[TrainingRun]
    memory: list[MemoryRun]
    updates: list[UpdateRun]


@dataclass(frozen=True)
class Compared:
    """A line of the table."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def agrees(self) -> bool:
        return 1 / AGREEMENT_FACTOR <= self.ratio <= AGREEMENT_FACTOR


def read_measurements(path: Path) -> Measurements:
    return Measurements.model_validate(json.loads(path.read_text()))


def cpu_of(found: Measurements, num_threads: int) -> Hardware:
    """The machine as one process with so many threads sees it."""
    (rates,) = (calibration for calibration in found.calibrations if calibration.num_threads == num_threads)
    return Hardware(
        name=f"{num_threads} CPU thread{'s' if num_threads > 1 else ''}",
        peak_flops_per_s=rates.matmul_flops_per_s,
        utilisation=1.0,
        memory_bytes=0,
        memory_bytes_per_s=rates.memory_bytes_per_s,
        link_bytes_per_s=rates.memory_bytes_per_s,
        network_bytes_per_s=rates.memory_bytes_per_s,
        devices_per_node=1,
        host_bytes_per_s=rates.memory_bytes_per_s,
        price_per_hour=0,
        has_segments=True,
        cache_block_tokens=128,
        engine_step_s=found.engine.step_s,
        engine_token_s=found.engine.token_s,
        engine_completion_s=found.engine.completion_s,
        activation_bytes_per_s=rates.activation_bytes_per_s,
        reorder_bytes_per_s=rates.reorder_bytes_per_s,
        kernel_s=rates.kernel_s,
        attention_call_s=rates.attention_call_s,
        update_s=found.engine.update_s,
        probe_s=found.engine.probe_s,
    )


def compare(found: Measurements, repository: Path) -> list[Compared]:
    """Every line; `repository` holds the configs."""
    lines = [
        Compared(run.name, "s", _predicted_seconds(run, found, repository), run.measured) for run in found.training
    ]
    lines += [Compared(run.name, "MiB", _predicted_mib(run), run.measured) for run in found.memory]
    for update in found.updates:
        predicted = shared_memory_update(shape_of_config(update.model), cpu_of(found, 1))
        lines.append(
            Compared(
                update.name,
                "s",
                predicted.loaded_s if update.kind == "loaded" else predicted.confirmed_s,
                update.measured,
            )
        )
    return lines


def measured_utilisation(found: Measurements, repository: Path) -> dict[str, float]:
    """Of the matrix-product rate, by reward-model run (MFU): its arithmetic over its measured time."""
    runs = [run for run in found.training if run.kind == "reward_model_step"]
    return {
        run.name: _reward_model_plan(run, found, repository).flops
        / run.measured
        / cpu_of(found, run.num_threads).peak_flops_per_s
        for run in runs
    }


def _reward_model_plan(run: TrainingRun, found: Measurements, repository: Path) -> TrainingPlan:
    config = load_config(repository / run.config, list(run.overrides))
    shape, lengths = (
        shape_of_config(config.model, vocab_size=run.vocab_size),
        Lengths(run.prompt_tokens, run.completion_tokens),
    )
    return reward_model_plan(config.reward_model, shape, lengths, cpu_of(found, run.num_threads))


def _predicted_seconds(run: TrainingRun, found: Measurements, repository: Path) -> float:
    if run.kind == "reward_model_step":
        return _reward_model_plan(run, found, repository).step_s
    config = load_config(repository / run.config, list(run.overrides))
    shape, lengths = (
        shape_of_config(config.model, vocab_size=run.vocab_size),
        Lengths(run.prompt_tokens, run.completion_tokens),
    )
    hardware = cpu_of(found, run.num_threads)
    if run.kind == "sft_step":
        return sft_plan(config.sft, shape, lengths, hardware).step_s
    plan = rloo_plan(config.rloo, shape, (), lengths, hardware, update=shared_memory_update(shape, hardware))
    return {"rloo_generate": plan.generate_s, "rloo_measure": plan.measure_s, "rloo_update": plan.update_s}[run.kind]


def _predicted_mib(run: MemoryRun) -> float:
    shape: ModelShape = shape_of_config(run.model)
    trained = Trained(shape, shape.reward_model_parameters, shape.reward_model_parameters)
    batch = MicroBatch(run.num_tokens, num_scored=run.num_scored)
    memory = trainer_memory(
        trained, batch, strategy=StrategyConfig(kind="ddp"), compute=ComputeConfig(), num_devices=1, overhead_bytes=0
    )
    before = 0 if run.includes_states else memory.state_bytes
    return (memory.training_bytes - before) / 2**20
