"""Predict by formulas what a config needs on given GPUs: memory, time, weight updates, traffic and cost.

python -m research.scaling --config pipelines/configs/full_rlhf.toml --hardware h100 --reward-model-base Qwen2.5-3B
    Print the predictions for one config. docs/results/scaling.md says what was checked.
python -m research.scaling --check
    Compare the predictions with docs/results/scaling_measured.json. The exit status is 1 if a prediction is wrong by
    more than a factor of two.
python -m research.scaling --update-docs
    Write the tables of docs/results/scaling.md and docs/results/recipes.md again. This measures nothing.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from research.scaling.hardware import GIB, GPUS, PRICES, Hardware
from research.scaling.measured import compare, read_measurements
from research.scaling.memory import TrainerMemory
from research.scaling.plans import (
    Lengths,
    TrainingPlan,
    policy_shape,
    reward_model_plan,
    reward_model_shape,
    rloo_plan,
    sft_plan,
)
from research.scaling.shapes import ModelShape, shape_named
from research.scaling.tables import COMPLETION, MEASURED, PAIR, TABLES, agreement_table, with_tables
from rm_robust.config.loading import load_config
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m research.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="TOML file of a pipeline")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="DOTTED.NAME=VALUE",
        dest="overrides",
        help="e.g. --set rloo.num_engines=8",
    )
    parser.add_argument("--hardware", choices=GPUS, default="h100")
    parser.add_argument(
        "--utilisation",
        type=float,
        help="fraction of the peak that training reaches: `throughput/utilisation` of a run (default: assumed)",
    )
    parser.add_argument("--price", type=float, help=PRICES)
    parser.add_argument("--policy", help="a directory with a config.json, or a known model, if model.path is neither")
    parser.add_argument("--reward-model-base", help="the same for reward_model.base_path")
    parser.add_argument(
        "--prompt-tokens",
        type=float,
        default=PAIR.prompt_tokens,
        help="mean length of a prompt (default: %(default)s, assumed)",
    )
    parser.add_argument(
        "--completion-tokens",
        type=float,
        default=PAIR.completion_tokens,
        help="mean length of a completion in the data (default: %(default)s, assumed)",
    )
    parser.add_argument(
        "--sampled-tokens",
        type=float,
        default=COMPLETION.completion_tokens,
        help="mean length of a completion that the policy samples (default: %(default)s, assumed)",
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--update-docs", action="store_true")
    parsed = parser.parse_args(arguments)
    repository = Path.cwd()
    try:
        if parsed.check:
            return check(repository)
        if parsed.update_docs:
            return update_docs(repository)
        if parsed.config is None:
            parser.error("--config names the pipeline's TOML file")
        print(estimate(load_config(parsed.config, parsed.overrides), parsed))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def check(repository: Path) -> int:
    print(agreement_table(repository))
    return 0 if all(line.agrees for line in compare(read_measurements(repository / MEASURED), repository)) else 1


def update_docs(repository: Path) -> int:
    for document in TABLES:
        path = repository / document
        path.write_text(with_tables(document, path.read_text(), repository))
    return 0


def estimate(config: PipelineConfig, parsed: argparse.Namespace) -> str:
    """Return the predictions for one config, as lines for a terminal."""
    gpu = GPUS[parsed.hardware]
    gpu = replace(
        gpu, utilisation=parsed.utilisation or gpu.utilisation, price_per_hour=parsed.price or gpu.price_per_hour
    )
    policy = shape_named(parsed.policy) if parsed.policy else policy_shape(config)
    base = shape_named(parsed.reward_model_base) if parsed.reward_model_base else reward_model_shape(config)
    data, sampled = (
        Lengths(parsed.prompt_tokens, parsed.completion_tokens),
        Lengths(parsed.prompt_tokens, parsed.sampled_tokens),
    )
    lines = [
        f"{gpu.name}, MFU {gpu.utilisation:.2f}, {gpu.price_per_hour:.2f} USD per GPU-hour: "
        "computed, not measured (docs/results/scaling.md)",
        f"texts of {data.prompt_tokens:.0f} + {data.completion_tokens:.0f} tokens, "
        f"sampled completions of {sampled.completion_tokens:.0f}",
    ]
    if config.sft.enabled:
        lines += training_lines(f"SFT of {policy.name}", sft_plan(config.sft, policy, data, gpu), gpu, "demonstrations")
    lines += training_lines(
        f"reward model on {base.name}", reward_model_plan(config.reward_model, base, data, gpu), gpu, "pairs"
    )
    return "\n".join([*lines, *rloo_lines(config, policy, base, sampled, gpu)])


def training_lines(title: str, plan: TrainingPlan, gpu: Hardware, groups: str) -> list[str]:
    hours = plan.device_hours(1e6)
    return [
        f"\n{title}, {plan.num_devices} GPUs",
        *memory_lines(plan.memory, gpu),
        f"  step      {plan.step_s:.2f} s for {plan.groups_per_step} {groups} "
        f"(computing {plan.compute_s:.2f}, sending {plan.communication_s:.2f}: "
        f"{plan.sent_bytes / 1e9:.1f} GB per GPU); {plan.tokens_per_s:,.0f} tokens/s",
        f"  10^6      {groups}: {hours / plan.num_devices:.1f} h, {hours * gpu.price_per_hour:,.0f} USD",
    ]


def memory_lines(memory: TrainerMemory, gpu: Hardware) -> list[str]:
    peak = memory.peak_bytes
    fits = "fits" if peak <= gpu.memory_bytes else f"DOES NOT FIT in {gpu.memory_bytes / GIB:.0f} GiB"
    return [
        f"  memory    {peak / GIB:.1f} GiB per GPU, {fits}: training {memory.training_bytes / GIB:.1f}, "
        f"loading {memory.loading_bytes / GIB:.1f}; states {memory.state_bytes / GIB:.1f}, "
        f"gathered {memory.gathered_bytes / GIB:.1f}, "
        f"activations {(memory.kept_bytes + memory.layer_bytes) / GIB:.1f}, "
        f"casts {memory.cast_bytes / GIB:.1f}, logits {memory.logit_bytes / GIB:.1f}"
    ]


def rloo_lines(
    config: PipelineConfig, policy: ModelShape, base: ModelShape, lengths: Lengths, gpu: Hardware
) -> list[str]:
    plan = rloo_plan(config.rloo, policy, (base, base), lengths, gpu)
    update = plan.weight_update
    return [
        f"\nRLOO of {policy.name}, {plan.num_trainers} trainers, "
        f"{plan.engines.count} engines of {plan.engines.num_devices_each} GPUs; the judge is as large as the proxy",
        *memory_lines(plan.memory, gpu),
        f"  step      generate {plan.generate_s:.1f} s, score {plan.score_device_s:.1f} GPU s, "
        f"measure {plan.measure_s:.1f}, update {plan.update_s:.1f}",
        f"  balanced  {plan.engine_devices_per_trainer:.2f} engine GPUs per trainer "
        f"(the config has {plan.engines.num_devices / plan.num_trainers:.2f})",
        f"  weights   {update.num_bytes / 1e9:.1f} GB to every engine: loaded after {update.loaded_s:.2f} s, "
        f"confirmed after {update.confirmed_s:.2f}",
        f"  store     {plan.object_store_bytes / 1e6:.1f} MB per step through Ray's object store; "
        "weights do not go through it",
    ]


if __name__ == "__main__":
    sys.exit(main())
