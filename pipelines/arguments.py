"""The options of the commands of this folder. `--help` needs only this file, so neither torch nor Ray is imported here.

Each `add_…_arguments` adds a command's options to a parser. The settings of a config are options too: they are what the
parser leaves over.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rm_robust.config.loading import overrides_of
from rm_robust.config.shared import Section
from rm_robust.errors import ConfigError

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny_cpu.toml"
STAGE_NAMES = ("world", "sft", "preferences", "reward_model", "evaluation", "rloo")
"""The names of rm_robust.runs.layout.STAGES, which loads much."""
SUITE_NAMES = ("preferences", "constant_answers", "rm_bench", "reward_bench", "reward_bench_2")
"""The names of rm_robust.evaluation.suites.SUITES, which loads torch."""


def parse_with_settings(
    parser: argparse.ArgumentParser, kind: type[Section], arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse a command line on which the settings of a config of `kind` are options too.

    The result has them as `overrides`, in their order. A wrong one ends the process with status 2 and one line.
    """
    options, left_over = parser.parse_known_args(arguments)
    try:
        options.overrides = overrides_of(left_over, kind)
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    return options


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that runs stages. parse_with_settings parses them."""
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        help="TOML file (default: pipelines/configs/tiny_cpu.toml, which needs no data)",
    )
    _add_run_dir_and_settings(parser)


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run with the default config. parse_with_settings parses them."""
    parser.set_defaults(config=DEFAULT_CONFIG)
    _add_run_dir_and_settings(parser)


def _add_run_dir_and_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir",
        help="where this run's files go: a path, or a URI (s3://…, gs://…); the same directory again resumes the run",
    )
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        choices=STAGE_NAMES,
        help="do this stage anew, from its first step, though the run has committed it; may be repeated",
    )
    _add_verbose_and_settings(parser, "--rloo.num_steps 200", "`rm-robust settings` lists the settings.")


def _add_verbose_and_settings(parser: argparse.ArgumentParser, example: str, where: str) -> None:
    parser.add_argument("--verbose", action="store_true", help="print every log line, of every process")
    name, value = example.removeprefix("--").split()
    parser.add_argument_group(
        "settings",
        f"--NAME VALUE sets what the config file would, e.g. {example}\n(--set {name}={value} is the same). "
        f"The last of several wins.\n{where}",
    )
    parser.usage = "%(prog)s [options] [--NAME VALUE …]"


def add_generate_responses_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of generate_responses.py. parse_with_settings parses them."""
    parser.add_argument(
        "--config", type=Path, required=True, help="TOML file, e.g. pipelines/configs/responses/paper.toml"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the responses; the same command again goes on there"
    )
    _add_verbose_and_settings(parser, "--num_prompts 100", "docs/reference/settings.md lists the settings.")


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of status.py."""
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="DIR",
        help="run directories, or folders of them (default: where runs go, RM_ROBUST_RUN_ROOT or runs/)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--watch", action="store_true", help="print again every few seconds, until Ctrl-C")


def is_of_suite(arguments: Sequence[str]) -> bool:
    """Return whether a command line of evaluate_reward_model.py is for a suite, and not for the stage of a run."""
    return any(argument.partition("=")[0] in ("--model", "--url", "--suite", "--help", "-h") for argument in arguments)


def add_suite_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of an evaluation on a benchmark or on a user's own files."""
    scored_by = parser.add_mutually_exclusive_group(required=True)
    scored_by.add_argument("--model", help="a reward-model checkpoint of this project: a directory, or a URI (s3://…)")
    scored_by.add_argument("--url", help="a service that answers /v1/score (the key is taken from RM_ROBUST_API_KEY)")
    parser.add_argument("--served-model", help="with --url: one of its models (default: its first)")
    parser.add_argument("--suite", choices=SUITE_NAMES, required=True)
    parser.add_argument(
        "--data", nargs="+", required=True, help="the suite's files or folders, jsonl or parquet, local or URIs"
    )
    parser.add_argument(
        "--by", help="in the suite preferences: the column that names a row's subset (default: subset, or else source)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of scores.jsonl and result.json; the same command again goes on there",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="the --out folder of another model's evaluation of the same data, to be compared with",
    )
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="FIGURE>=NUMBER",
        help="exit with status 1 when it does not hold; may be repeated",
    )
    parser.add_argument(
        "--leave-out-refused",
        action="store_true",
        help="count cases without scores (too long) and leave them out, instead of stopping",
    )
    _add_scorer_arguments(parser)


def _add_scorer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="with --model (default: %(default)s)")
    parser.add_argument(
        "--max-length-tokens",
        type=int,
        help="with --model: most tokens of a prompt and one completion (default: what the model can read)",
    )
    parser.add_argument("--max-tokens-per-batch", type=int, default=8192, help="with --model (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="with --model: Ray workers that share the cases, each with the checkpoint (default: this process)",
    )
    parser.add_argument(
        "--cpus-per-worker",
        type=float,
        default=1,
        help="cores and threads of each worker (default: %(default)s); with --device cuda each worker also has one GPU",
    )
