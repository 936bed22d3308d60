"""`rm-robust` parses the options of every command before it imports what the command's work needs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipelines.arguments import DEFAULT_CONFIG, SUITE_NAMES
from pipelines.command import BY_NAME, COMMANDS, EVALUATE, EVALUATE_ON_SUITE, Command, command_for, main, named, parsed
from pipelines.driver import run_of
from pipelines.stages import ALL_STAGES
from rm_robust.evaluation.suites import SUITES

VERSION = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["version"]
LAST_LINE_IS_WHAT_IS_HEAVY = """
import sys
from pipelines.command import main

try:
    status = main(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
print(sorted({"torch", "ray", "transformers", "pyarrow"} & set(sys.modules)))
sys.exit(status)
"""
SUITE_ARGUMENTS = ["--model", "a", "--suite", "rm_bench", "--data", "b", "--out", "c"]


def run(*arguments: str) -> tuple[int, list[str], str]:
    """Return the exit code, the lines that a process printed, last what it has imported, and its errors."""
    command = [sys.executable, "-c", LAST_LINE_IS_WHAT_IS_HEAVY, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout.splitlines(), ended.stderr


@pytest.mark.parametrize("name", [*BY_NAME, ""])
def test_help_imports_nothing_heavy(name: str) -> None:
    status, lines, _ = run(*([name] if name else []), "--help")
    assert (status, lines.pop()) == (0, "[]")
    assert f"usage: rm-robust {name}".strip() in lines[0]
    assert not name or any(line.startswith(f"  rm-robust {name} ") for line in lines), "an example"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run", "--rloo.num_stepz", "3"], "error: --rloo.num_stepz is neither an option nor a setting. The nearest"),
        (["generate-responses", "--config=a", "--out=b", "--promts=3"], "error: --promts is neither an option nor"),
        (["serve", "--prot", "8000"], "rm-robust serve: error: "),
        (["evaluate", *SUITE_ARGUMENTS, "--rloo.num_steps=3"], "unrecognized arguments: --rloo.num_steps=3"),
        (["keys", "a b"], "letters, digits, _ and - only, got 'a b'"),
    ],
)
def test_wrong_options_are_refused_before_anything_heavy_is_imported(arguments: list[str], error: str) -> None:
    status, lines, errors = run(*arguments)
    assert (status, lines) == (2, ["[]"])
    assert error in errors


def test_help_gives_every_command_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 110 for line in lines)
    for heading, commands in COMMANDS.items():
        start = lines.index(f"{heading}:") + 1
        shown = lines[start : start + len(commands)]
        assert [line.split()[0] for line in shown] == [command.name for command in commands]


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rm-robust {VERSION}\n"


@pytest.mark.parametrize(
    ("typed", "nearest"), [("trian-policy", "train-policy"), ("evalaute", "evaluate"), ("key", "keys")]
)
def test_an_unknown_command_gets_one_line_with_the_nearest_and_all(
    typed: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: There is no command '{typed}'. The nearest is {nearest}. The commands are demo, run,"
    )
    assert all(name in line for name in BY_NAME)


def test_without_a_command_the_list_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "train-sft" in printed.err


@pytest.mark.parametrize("command", [*BY_NAME.values(), EVALUATE_ON_SUITE], ids=lambda command: command.name)
def test_every_part_that_the_table_names_exists(command: Command) -> None:
    for part in (command.arguments, command.work, command.settings):
        assert part is None or callable(named(part))


@pytest.mark.parametrize(
    "form", [["--rloo.num_steps", "200"], ["--rloo.num_steps=200"], ["--set", "rloo.num_steps=200"]]
)
def test_a_setting_is_an_option(form: list[str], tmp_path: Path) -> None:
    arguments = ["--run-dir", str(tmp_path), *form, "--verbose"]
    options = parsed(BY_NAME["run"], arguments)
    assert run_of(options).config.rloo.num_steps == 200
    assert (options.verbose, options.config) == (True, DEFAULT_CONFIG)


def test_every_stage_that_a_command_names_exists_and_run_names_them_all() -> None:
    stages = [stage.name for stage in ALL_STAGES]
    assert [name for name in stages if name in BY_NAME["run"].stages] == stages
    assert all(set(command.stages) <= set(stages) for command in BY_NAME.values())


@pytest.mark.parametrize("script", sorted(Path("pipelines").glob("*.py")), ids=lambda script: script.stem)
def test_the_help_of_a_script_is_that_of_its_command(script: Path) -> None:
    if 'if __name__ == "__main__":' not in script.read_text() or script.stem == "__main__":
        pytest.skip("it is no script")
    ended = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage: rm-robust ")


def test_demo_is_a_run_of_the_default_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert BY_NAME["demo"].work == BY_NAME["run"].work
    assert parsed(BY_NAME["demo"], []) == parsed(BY_NAME["run"], [])
    with pytest.raises(SystemExit):
        parsed(BY_NAME["demo"], ["--config", "mine.toml"])
    assert "--config is neither an option nor a setting" in capsys.readouterr().err


def test_evaluate_is_of_a_suite_with_a_suite_and_otherwise_of_a_run() -> None:
    assert command_for("evaluate", ["--suite=rm_bench"]) is EVALUATE_ON_SUITE
    assert command_for("evaluate", ["--run-dir", "runs/mine"]) is EVALUATE
    assert parsed(EVALUATE_ON_SUITE, SUITE_ARGUMENTS).suite == "rm_bench"


def test_the_names_of_the_suites_are_those_of_the_suites() -> None:
    assert tuple(SUITES) == SUITE_NAMES


def test_python_m_pipelines_is_the_same_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "pipelines", "--version"], capture_output=True, text=True, timeout=60)
    assert ended.stdout == f"rm-robust {VERSION}\n"
