"""Compare what runs took on a machine with the predictions of the formulas from that machine's calibrated rates.

`research/bench/scaling.py` writes the file of measurements. It measures the rates apart from the runs: a matrix
product, an addition of long vectors, a gated activation, a transposed copy, a chain of tiny modules, attention over
short texts, and steps and a weight update of an engine with another, smaller model. No rate is fitted to a line of the
table.
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
"""The factor, in either direction, within which a prediction agrees with the measurement."""


class Calibration(Section):
    """The rates of one process with `num_threads` threads."""

    num_threads: int = Field(ge=1)
    matmul_flops_per_s: float = Field(gt=0)
    """Operations per second of float32 products of matrices as large as a tiny model's."""
    memory_bytes_per_s: float = Field(gt=0)
    """Bytes per second that an addition of vectors reads and writes if no cache holds them."""
    activation_bytes_per_s: float = Field(gt=0)
    """Bytes per second that a gated activation and its gradient read and write, on vectors of a tiny model's size."""
    reorder_bytes_per_s: float = Field(gt=0)
    """Bytes per second that a copy of a transposed matrix reads and writes."""
    kernel_s: float = Field(gt=0)
    """Seconds of a module with one operator on two numbers, or of its gradient."""
    attention_call_s: tuple[float, float]
    """Seconds per operator that segment attention calls, forward and backward.

    The texts are too short to fill a block of its kernel.
    """


class EngineCalibration(Section):
    """The costs of a vLLM engine with the policy of 0.3 M parameters, which no line of the table uses."""

    step_s: float = Field(ge=0)
    """Seconds of a decoding step without sequences."""
    token_s: float = Field(ge=0)
    """Seconds that each sequence adds to a decoding step."""
    completion_s: float = Field(ge=0)
    """Seconds that a completion of any length costs once, until the caller has it."""
    update_s: float = Field(ge=0)
    """Seconds until a weight update is loaded."""
    probe_s: float = Field(ge=0)
    """Seconds from then until the update is confirmed."""


class TrainingRun(Section):
    """A measurement of a config's steps: the median."""

    name: str
    kind: Literal["reward_model_step", "sft_step", "rloo_generate", "rloo_measure", "rloo_update"]
    config: str
    """The path of the config below the repository."""
    overrides: tuple[str, ...] = ()
    """The changes to the config, as `--set` takes them."""
    num_threads: int = Field(ge=1)
    """The threads of the measured process."""
    vocab_size: int = Field(ge=1)
    prompt_tokens: float = Field(gt=0)
    completion_tokens: float = Field(gt=0)
    measured: float = Field(gt=0)
    """The measured seconds."""


class MemoryRun(Section):
    """A measurement of a trainer's peak resident memory, above what its process held before."""

    name: str
    model: ModelConfig
    num_tokens: float = Field(gt=0)
    """The tokens of a micro-batch."""
    num_scored: float = Field(gt=0)
    """The tokens of a micro-batch at which a score is read."""
    includes_states: bool
    """Whether the measured memory includes weights, gradients and moments.

    It does not if the process made a step before (research/bench/memory.py): it then held them already.
    """
    measured: float = Field(gt=0)
    """The measured mebibytes."""


class UpdateRun(Section):
    """A measurement of weight updates of one engine beside the trainer: the median."""

    name: str
    model: ModelConfig
    kind: Literal["loaded", "confirmed"]
    measured: float = Field(gt=0)
    """The measured seconds."""


class Measurements(Section):
    """All measurements of one machine."""

    machine: str
    source: str
    """How the figures were measured."""
    is_calibrated: bool
    """Whether the rates below were measured. If not, they are nominal."""
    calibrations: list[Calibration]
    engine: EngineCalibration
    training: list[TrainingRun]
    memory: list[MemoryRun]
    updates: list[UpdateRun]


@dataclass(frozen=True)
class Compared:
    """One line of the table: a prediction and its measurement."""

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


def cpu_of(measurements: Measurements, num_threads: int) -> Hardware:
    """Return the machine as one process with `num_threads` threads sees it."""
    (rates,) = (calibration for calibration in measurements.calibrations if calibration.num_threads == num_threads)
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
        engine_step_s=measurements.engine.step_s,
        engine_token_s=measurements.engine.token_s,
        engine_completion_s=measurements.engine.completion_s,
        activation_bytes_per_s=rates.activation_bytes_per_s,
        reorder_bytes_per_s=rates.reorder_bytes_per_s,
        kernel_s=rates.kernel_s,
        attention_call_s=rates.attention_call_s,
        update_s=measurements.engine.update_s,
        probe_s=measurements.engine.probe_s,
    )


def compare(measurements: Measurements, repository: Path) -> list[Compared]:
    """Return every line of the table. The configs are read from `repository`."""
    lines = [
        Compared(run.name, "s", _predicted_seconds(run, measurements, repository), run.measured)
        for run in measurements.training
    ]
    lines += [Compared(run.name, "MiB", _predicted_mib(run), run.measured) for run in measurements.memory]
    for update in measurements.updates:
        predicted = shared_memory_update(shape_of_config(update.model), cpu_of(measurements, 1))
        lines.append(
            Compared(
                update.name,
                "s",
                predicted.loaded_s if update.kind == "loaded" else predicted.confirmed_s,
                update.measured,
            )
        )
    return lines


def measured_utilisation(measurements: Measurements, repository: Path) -> dict[str, float]:
    """Return the MFU of every reward-model run: its arithmetic over its measured time and the matrix-product rate."""
    runs = [run for run in measurements.training if run.kind == "reward_model_step"]
    return {
        run.name: _reward_model_plan(run, measurements, repository).flops
        / run.measured
        / cpu_of(measurements, run.num_threads).peak_flops_per_s
        for run in runs
    }


def _reward_model_plan(run: TrainingRun, measurements: Measurements, repository: Path) -> TrainingPlan:
    config = load_config(repository / run.config, list(run.overrides))
    shape, lengths = (
        shape_of_config(config.model, vocab_size=run.vocab_size),
        Lengths(run.prompt_tokens, run.completion_tokens),
    )
    return reward_model_plan(config.reward_model, shape, lengths, cpu_of(measurements, run.num_threads))


def _predicted_seconds(run: TrainingRun, measurements: Measurements, repository: Path) -> float:
    if run.kind == "reward_model_step":
        return _reward_model_plan(run, measurements, repository).step_s
    config = load_config(repository / run.config, list(run.overrides))
    shape, lengths = (
        shape_of_config(config.model, vocab_size=run.vocab_size),
        Lengths(run.prompt_tokens, run.completion_tokens),
    )
    hardware = cpu_of(measurements, run.num_threads)
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
