"""The Markdown tables of docs/results/scaling.md and docs/results/recipes.md.

Each table stands in its document between two marks with its name. A test checks that document and formulas agree.
"""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from research.scaling.generation import Engines, cached_tokens
from research.scaling.hardware import GIB, GPUS, Hardware
from research.scaling.measured import compare, measured_utilisation, read_measurements
from research.scaling.memory import TrainerMemory
from research.scaling.plans import Lengths, reward_model_plan, reward_model_shape, rloo_plan
from research.scaling.publication import nccl_update
from research.scaling.shapes import SHAPES, ModelShape
from rm_robust.config.loading import load_config
from rm_robust.config.rloo import RlooConfig
from rm_robust.config.shared import ComputeConfig, StrategyConfig, WorkersConfig
from rm_robust.config.training import RewardModelConfig

MEASURED = Path("docs/results/scaling_measured.json")
PROSE_COLUMNS = 110
GPU = GPUS["h100"]
MODELS = tuple(SHAPES[name] for name in ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"))
NUM_GPUS = (1, 8, 32, 128)
TRAINED_ON = {"llama-3.2-1b": (8, 32), "llama-3.1-8b": (8, 32, 128), "llama-3.1-70b": (32, 128)}
PAIR = Lengths(200, 350)
COMPLETION = Lengths(200, 300)
MILLION = 1e6
TENSOR_PARALLEL = {"llama-3.1-70b": 8}
"""The GPUs of an engine by model. An engine of any other model has 1."""
BIG = ComputeConfig(precision="bfloat16", gradient_checkpointing=True)
STRATEGIES = {
    "DDP": StrategyConfig(kind="ddp"),
    "FSDP2": StrategyConfig(kind="fsdp2"),
    "ZeRO-1": StrategyConfig(kind="deepspeed", zero_stage=1),
    "ZeRO-2": StrategyConfig(kind="deepspeed", zero_stage=2),
    "ZeRO-3": StrategyConfig(kind="deepspeed", zero_stage=3),
}
REWARD_MODEL = RewardModelConfig(batch_size=512, max_tokens_per_micro_batch=8192, compute=BIG)
RLOO = RlooConfig(
    num_prompts_per_step=128,
    num_completions_per_prompt=4,
    max_new_tokens=1024,
    max_tokens_per_micro_batch=8192,
    compute=BIG,
    num_engines=8,
    engine_dtype="bfloat16",
    trainers=WorkersConfig(num_workers=8),
)


@dataclass(frozen=True)
class Recipe:
    """A config of docs/results/recipes.md, with the size of its data, which the config does not say."""

    name: str
    num_pairs: int
    lengths: Lengths


RECIPES = (
    *(Recipe(f"part1_{model}", 51_200, PAIR) for model in ("llama_1b", "llama_3b", "qwen_1.5b", "qwen_3b")),
    Recipe("part3_reward_model", 80_000, Lengths(300, 550)),
)
RECIPE_GPUS = (1, 2, 4, 8)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shapes_table(repository: Path) -> str:
    rows = [
        [
            s.name,
            f"{s.policy_parameters:,}",
            f"{s.reward_model_parameters:,}",
            f"{s.embedding_parameters / 1e9:.2f}",
            f"{s.kv_cache_bytes_per_token(2) / 1024:.0f}",
        ]
        for s in MODELS
    ]
    return markdown(
        [
            "model",
            "policy, parameters",
            "reward model, parameters",
            "embedding alone, 10^9",
            "KV cache, KiB per token",
        ],
        rows,
    )


def reward_model_memory_table(repository: Path) -> str:
    return _memory_table(
        lambda shape, strategy, count: (
            reward_model_plan(
                REWARD_MODEL.model_copy(update={"strategy": strategy}), shape, PAIR, GPU, num_devices=count
            ).memory
        )
    )


def policy_memory_table(repository: Path) -> str:
    def memory(shape: ModelShape, strategy: StrategyConfig, count: int) -> TrainerMemory:
        settings = RLOO.model_copy(update={"strategy": strategy, "trainers": WorkersConfig(num_workers=count)})
        return rloo_plan(settings, shape, (), COMPLETION, GPU).memory

    return _memory_table(memory)


def _memory_table(memory: Callable[[ModelShape, StrategyConfig, int], TrainerMemory]) -> str:
    rows = []
    for shape in MODELS:
        for name, strategy in STRATEGIES.items():
            memories = [memory(shape, strategy, count) for count in NUM_GPUS]
            rows.append(
                [
                    shape.name,
                    name,
                    _gib(memories[0].loading_bytes + memories[0].overhead_bytes),
                    *(_gib(of_count.training_bytes) for of_count in memories),
                ]
            )
    return markdown(["model", "strategy", "loading", *map(_gpus, NUM_GPUS)], rows)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.0f}" + ("*" if num_bytes > GPU.memory_bytes else "")


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def reward_model_time_table(repository: Path) -> str:
    rows = []
    for shape in MODELS:
        for count in TRAINED_ON[shape.name.lower()]:
            for name in ("FSDP2", "ZeRO-3"):
                settings = REWARD_MODEL.model_copy(update={"strategy": STRATEGIES[name]})
                plan = reward_model_plan(settings, shape, PAIR, GPU, num_devices=count)
                hours = plan.device_hours(MILLION)
                seconds = f"{plan.compute_s:.1f} | {plan.communication_s:.1f} | {plan.step_s:.1f}"
                traffic = f"{plan.sent_bytes / 1e9:,.0f}"
                rows.append(
                    [
                        shape.name,
                        str(count),
                        name,
                        traffic,
                        seconds,
                        f"{plan.tokens_per_s:,.0f}",
                        f"{hours / count:.1f}",
                        f"{hours * GPU.price_per_hour:,.0f}",
                    ]
                )
    header = [
        "model",
        "GPUs",
        "strategy",
        "GB sent per GPU and step",
        "computing s",
        "sending s",
        "step s",
        "tokens/s",
        "hours, 10^6 pairs",
        "USD, 10^6 pairs",
    ]
    return markdown(header, rows)


def weight_update_table(repository: Path) -> str:
    rows = []
    for shape in MODELS:
        engines = _engines(shape)
        whole, sharded = (
            nccl_update(shape, engines, GPU, num_trainers=8, is_sharded=is_sharded) for is_sharded in (False, True)
        )
        rows.append(
            [shape.name, f"{whole.num_bytes / 1e9:.1f}", f"{whole.loaded_s:.2f}", f"{whole.confirmed_s:.2f}"]
            + [f"{sharded.gathered_bytes / 1e9:.1f}", f"{sharded.loaded_s:.2f}", f"{sharded.confirmed_s:.2f}"]
        )
    header = [
        "policy",
        "GB sent",
        "whole: loaded s",
        "confirmed s",
        "sharded over 8: GB gathered",
        "loaded s",
        "confirmed s",
    ]
    return markdown(header, rows)


def rloo_table(repository: Path) -> str:
    rows = []
    for shape in MODELS:
        settings = RLOO.model_copy(
            update={"tensor_parallel_size": _engines(shape).num_devices_each, "strategy": STRATEGIES["FSDP2"]}
        )
        plan = rloo_plan(settings, shape, (shape, shape), COMPLETION, GPU)
        cache = cached_tokens(shape, plan.engines, GPU)
        rows.append(
            [
                shape.name,
                f"{plan.engines.count} x {plan.engines.num_devices_each}",
                f"{cache / 1e3:,.0f}",
                f"{plan.generate_s:.1f}",
                f"{plan.score_device_s:.1f}",
            ]
            + [f"{plan.measure_s:.1f}", f"{plan.update_s:.1f}", f"{plan.weight_update.confirmed_s:.1f}"]
            + [f"{plan.object_store_bytes / 1e6:.1f}", f"{plan.engine_devices_per_trainer:.1f}"]
        )
    header = [
        "policy and reward models",
        "engines x GPUs",
        "cached tokens per engine, 10^3",
        "generate s",
        "score, GPU s",
        "measure s",
        "update s",
        "weight update s",
    ]
    return markdown([*header, "MB through the object store", "balanced: engine GPUs per trainer"], rows)


def _engines(shape: ModelShape) -> Engines:
    return Engines(
        RLOO.num_engines, TENSOR_PARALLEL.get(shape.name.lower(), 1), RLOO.max_num_sequences, bytes_per_value=2
    )


def hardware_table(repository: Path) -> str:
    def row(gpu: Hardware) -> list[str]:
        rates = (
            f"{gpu.peak_flops_per_s / 1e12:.0f} | {gpu.memory_bytes / GIB:.0f} | {gpu.memory_bytes_per_s / 1e12:.2f}"
        )
        links = f"{gpu.link_bytes_per_s / 1e9:.0f} | {gpu.network_bytes_per_s / 1e9:.0f}"
        return [
            gpu.name,
            rates,
            links,
            f"{gpu.utilisation:.2f}",
            f"{gpu.decode_utilisation:.2f}",
            f"{gpu.price_per_hour:.2f}",
        ]

    header = [
        "GPU",
        "TFLOP/s, bfloat16",
        "GiB",
        "memory TB/s",
        "NVLink GB/s",
        "network GB/s",
        "MFU",
        "decoding, of memory TB/s",
        "USD per hour",
    ]
    return markdown(header, map(row, GPUS.values()))


def calibration_table(repository: Path) -> str:
    measurements = read_measurements(repository / MEASURED)
    rows = [
        [
            f"{rates.num_threads}",
            f"{rates.matmul_flops_per_s / 1e9:.0f}",
            f"{rates.memory_bytes_per_s / 1e9:.1f}",
            f"{rates.activation_bytes_per_s / 1e9:.1f}",
            f"{rates.reorder_bytes_per_s / 1e9:.1f}",
            f"{rates.kernel_s * 1e6:.1f}",
            ", ".join(f"{seconds * 1e6:.1f}" for seconds in rates.attention_call_s),
        ]
        for rates in measurements.calibrations
    ]
    engine = measurements.engine
    engine_costs = (
        f"An engine takes {engine.step_s * 1e3:.2f} ms per step, {engine.token_s * 1e6:.0f} us per token and "
        f"{engine.completion_s * 1e3:.1f} ms per completion. A weight update takes {engine.update_s * 1e3:.0f} ms "
        f"besides its bytes, and its confirmation {engine.probe_s * 1e3:.0f} ms."
    )
    kind = "Measured" if measurements.is_calibrated else "NOMINAL, NOT MEASURED"
    table = markdown(
        [
            "threads",
            "matrix products GFLOP/s",
            "memory GB/s",
            "activations GB/s",
            "reordering GB/s",
            "a call, us",
            "a call in attention, us (forward, backward)",
        ],
        rows,
    )
    shares = "; ".join(f"{name}: {share:.2f}" for name, share in measured_utilisation(measurements, repository).items())
    machine = _wrapped(f"{measurements.machine}. {kind}: {measurements.source}")
    utilisation = _wrapped(f"MFU, as a fraction of the rate of matrix products: {shares}.")
    return f"{machine}\n\n{table}\n\n{_wrapped(engine_costs)}\n\n{utilisation}"


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, PROSE_COLUMNS, break_long_words=False, break_on_hyphens=False)


def agreement_table(repository: Path) -> str:
    lines = compare(read_measurements(repository / MEASURED), repository)
    rows = [
        [
            line.name,
            f"{line.predicted:.3g} {line.unit}",
            f"{line.measured:.3g} {line.unit}",
            f"{line.ratio:.2f}",
            "yes" if line.agrees else "**no**",
        ]
        for line in lines
    ]
    return markdown(["", "predicted", "measured", "predicted / measured", "within a factor of two"], rows)


def recipes_table(repository: Path) -> str:
    rows = []
    for recipe in RECIPES:
        config = load_config(repository / "pipelines" / "configs" / f"{recipe.name}.toml", [])
        shape, gpu = reward_model_shape(config), GPUS["a100"]
        plans = [
            reward_model_plan(config.reward_model, shape, recipe.lengths, gpu, num_devices=count)
            for count in RECIPE_GPUS
        ]
        cells = [
            f"{plan.memory.peak_bytes / GIB:.0f} GiB, {plan.device_hours(recipe.num_pairs) / plan.num_devices:.1f} h"
            for plan in plans
        ]
        rows.append([recipe.name, *cells])
    return markdown(["recipe", *map(_gpus, RECIPE_GPUS)], rows)


TABLES: dict[str, dict[str, Callable[[Path], str]]] = {
    "docs/results/scaling.md": {
        "agreement": agreement_table,
        "calibration": calibration_table,
        "shapes": shapes_table,
        "hardware": hardware_table,
        "reward_model_memory": reward_model_memory_table,
        "policy_memory": policy_memory_table,
        "reward_model_time": reward_model_time_table,
        "weight_update": weight_update_table,
        "rloo": rloo_table,
    },
    "docs/results/recipes.md": {"recipes": recipes_table},
}
"""The functions that make the tables, by document and name. Each takes the repository."""


def with_tables(document: str, text: str, repository: Path) -> str:
    """Return `text` with a new table between each pair of marks. Raises AssertionError if a mark is missing."""
    for name, table in TABLES[document].items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, separator, rest = text.partition(begin)
        _, closing, after = rest.partition(end)
        assert separator, f"{document} lacks {begin}"
        assert closing, f"{document} lacks {end}"
        text = f"{before}{begin}\n{table(repository)}\n{end}{after}"
    return text
