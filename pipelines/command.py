"""The console command `rm-robust`, which is also `python -m pipelines`.

COMMANDS is the table of its commands. A command's options are parsed before the module of its work is imported, because
that takes seconds (torch, Ray) and only the options are needed to print --help or to refuse a typing mistake.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from pipelines.arguments import is_of_suite, parse_with_settings
from rm_robust.errors import NotInstalledError

UP_TO_THE_TABLE = ("world", "sft", "preferences", "reward_model", "evaluation", "bt_twin")


@dataclass(frozen=True)
class Command:
    """One command of `rm-robust`. Its parts are named as module:name, so that each is imported when it is needed."""

    name: str
    summary: str
    examples: tuple[str, ...]
    """What may follow the command's name."""
    arguments: str
    """The function that adds the options to a parser. Its module is light."""
    work: str
    """The function that does the work for the parsed options and returns the exit code."""
    settings: str | None = None
    """The config whose settings are options of the command too."""
    stages: tuple[str, ...] = ()
    """The stages (pipelines/stages.py) that the command runs."""


def run_of_stages(name: str, summary: str, example: str, *stages: str) -> Command:
    """Return a command that runs these stages."""
    return Command(
        name,
        summary,
        (example,),
        "pipelines.arguments:add_run_arguments",
        "pipelines.driver:main",
        "rm_robust.config.run:PipelineConfig",
        stages,
    )


RUN = run_of_stages(
    "run",
    "run all stages: SFT, pairs, reward model, its table, RLOO, report",
    "--config mine.toml --run-dir runs/mine --rloo.num_steps 200",
    *UP_TO_THE_TABLE,
    "rloo",
    "report",
)
DEMO = replace(
    RUN,
    name="demo",
    summary="run all stages on the default config, which needs no data",
    examples=("--run-dir runs/first",),
    arguments="pipelines.arguments:add_demo_arguments",
)
EVALUATE = run_of_stages(
    "evaluate",
    "make a run's four-scenario table; or evaluate any reward model on a benchmark (--suite)",
    "--config mine.toml --run-dir runs/mine",
    "evaluation",
)
EVALUATE_ON_SUITE = replace(
    EVALUATE,
    summary="evaluate a reward model on a benchmark or on your own files, with the options below; "
    "or, without them,\nmake the four-scenario table of a run, with the options of `rm-robust run`",
    examples=(
        "--model runs/mine/checkpoints/reward_model --suite rm_bench --data rm_bench.jsonl --out runs/rm_bench",
        *EVALUATE.examples,
    ),
    arguments="pipelines.arguments:add_suite_arguments",
    work="pipelines.evaluate_suite:evaluate_suite",
    settings=None,
    stages=(),
)
"""What `rm-robust evaluate` is with --suite."""
COMMANDS = {
    "Run the pipeline": (
        DEMO,
        RUN,
        run_of_stages(
            "run-reward-model",
            "run all stages but RLOO: the reward model, its table, report",
            "--config mine.toml --run-dir runs/mine",
            *UP_TO_THE_TABLE,
            "report",
        ),
    ),
    "Run one stage, in the run directory of the stages before it": (
        run_of_stages(
            "train-sft",
            "fine-tune the policy on demonstrations",
            "--config mine.toml --run-dir runs/mine",
            "world",
            "sft",
        ),
        run_of_stages(
            "prepare-preferences",
            "build and tokenise the preference pairs and the four scenarios",
            "--config mine.toml --run-dir runs/mine",
            "world",
            "preferences",
        ),
        run_of_stages(
            "train-reward-model",
            "train the reward model on the pairs",
            "--config mine.toml --run-dir runs/mine --reward_model.objective bt",
            "reward_model",
        ),
        EVALUATE,
        run_of_stages(
            "train-policy",
            "train the policy with RLOO against the reward model",
            "--config mine.toml --run-dir runs/mine --rloo.num_steps 200",
            "rloo",
        ),
    ),
    "Serve and use reward models": (
        Command(
            "serve",
            "serve reward models over HTTP on this machine",
            ("--checkpoint runs/mine/checkpoints/reward_model --keys keys.toml --port 8000",),
            "serve.arguments:add_arguments",
            "serve.__main__:main",
        ),
        Command(
            "keys",
            "make an API key, and its line for the keys file",
            ("alice",),
            "serve.keys:add_arguments",
            "serve.keys:main",
        ),
        Command(
            "score",
            "score a jsonl file over HTTP, with the key in RM_ROBUST_API_KEY",
            ("data.jsonl --url http://127.0.0.1:8000",),
            "rm_robust.scoring.files:add_arguments",
            "rm_robust.scoring.files:main",
        ),
        Command(
            "adopt",
            "turn a reward model from elsewhere into a checkpoint to serve",
            ("downloads/their_reward_model checkpoints/theirs",),
            "rm_robust.models.adopt_arguments:add_arguments",
            "rm_robust.models.adopt:main",
        ),
    ),
    "Make data": (
        Command(
            "generate-responses",
            "generate responses of named models to prompts, and label them with gold scores",
            ("--config pipelines/configs/responses/tiny.toml --out runs/responses --num_prompts 100",),
            "pipelines.arguments:add_generate_responses_arguments",
            "pipelines.generate_responses:main",
            "rm_robust.responses.config:ResponsesConfig",
        ),
    ),
    "Look up": (
        Command(
            "status",
            "show where runs stand, and the time left of their stages",
            ("runs/mine --watch",),
            "pipelines.arguments:add_status_arguments",
            "pipelines.status:main",
        ),
        Command(
            "settings",
            "print every setting with its type, bounds, default and meaning",
            ("rloo", "--toml > mine.toml"),
            "pipelines.settings:add_arguments",
            "pipelines.settings:main",
        ),
    ),
}
"""The commands under the headings of --help, in its order."""
BY_NAME = {command.name: command for commands in COMMANDS.values() for command in commands}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rm-robust`, and return its exit code.

    2: a wrong command line or a missing package; 130: stopped with Ctrl-C; otherwise the command's own.
    """
    try:
        return run_command(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before the command's own work began
        print("Stopped.", file=sys.stderr)
        return 130


def run_command(arguments: Sequence[str]) -> int:
    """Run the command that the arguments begin with, and return its exit code."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help", ""):
        print(overview(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        print(f"rm-robust {version('rm-robust')}")
        return 0
    if name not in BY_NAME:
        near = [f" The nearest is {match}." for match in difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.4)]
        print(
            f"error: There is no command {name!r}.{''.join(near)} The commands are {', '.join(BY_NAME)}.",
            file=sys.stderr,
        )
        return 2
    command = command_for(name, rest)
    return do(command, parsed(command, rest))


def do(command: Command, options: argparse.Namespace) -> int:
    """Do a command's work, and return its exit code."""
    try:
        if command.stages:
            options.stages = command.stages
            start_to_import_for_workers()
        work: Callable[[argparse.Namespace], int] = named(command.work)
        return work(options)
    except ModuleNotFoundError as error:
        if error.name is None or find_spec("torch") is not None:
            raise
        print(f"error: {NotInstalledError(f'`rm-robust {command.name}`', error.name)}", file=sys.stderr)
        return 2


def start_to_import_for_workers() -> None:
    """Let the worker server of a local run import its libraries while this process imports its own."""
    from rm_robust.cluster import worker_server  # the light installation lacks psutil

    if "RAY_ADDRESS" not in os.environ:
        worker_server.start()


def overview() -> str:
    """Return what `rm-robust --help` prints: every command with one line, under headings."""
    width = max(map(len, BY_NAME))
    lines = ["usage: rm-robust COMMAND [options]", "       rm-robust COMMAND --help", "       rm-robust --version"]
    for heading, commands in COMMANDS.items():
        lines += ["", f"{heading}:", *(f"  {command.name:{width}}  {command.summary}" for command in commands)]
    return "\n".join(lines)


def command_for(name: str, arguments: Sequence[str]) -> Command:
    """Return the command of a name. `evaluate` is two: a stage of a run, and an evaluation on a suite."""
    return EVALUATE_ON_SUITE if name == EVALUATE.name and is_of_suite(arguments) else BY_NAME[name]


def parsed(command: Command, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command's options. Prints --help, or why they are wrong, and raises SystemExit, as argparse does."""
    parser = argparse.ArgumentParser(
        prog=f"rm-robust {command.name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog="\n".join(["examples:", *(f"  rm-robust {command.name} {example}" for example in command.examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    named(command.arguments)(parser)
    if command.settings is None:
        return parser.parse_args(arguments)
    return parse_with_settings(parser, named(command.settings), arguments)


def named(path: str) -> Any:
    """Import what `module:name` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
