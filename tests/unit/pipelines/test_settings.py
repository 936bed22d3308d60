"""The command prints every setting, a TOML file that is the default config, and the page of the settings."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.settings import add_arguments, main, page
from rm_robust.config.loading import load_config
from rm_robust.config.run import PipelineConfig
from rm_robust.config.training import LoraConfig

PAGE = Path("docs/reference/settings.md")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main(parser.parse_args(arguments)) == 0
    return capsys.readouterr().out


def uncommented(toml: str) -> str:
    """Return the file with every default as a value, but for those of tables that are left out by default."""
    lines, is_in_a_table = [], True
    for line in toml.splitlines():
        if re.match(r"#?\[", line):
            is_in_a_table = line.startswith("[")
        lines.append(line.removeprefix("#") if is_in_a_table and re.match(r"#\w+ = ", line) else line)
    return "\n".join(lines)


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), f"write it anew: rm-robust settings --markdown > {PAGE}"


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--markdown") == PAGE.read_text()


def test_the_page_has_the_settings_of_a_key() -> None:
    assert "| `api_keys.requests_per_minute` | integer >= 1 | none | The most requests within any minute." in page()


def test_the_page_shows_no_name_in_angle_brackets_as_html() -> None:
    outside_of_code = re.sub("`[^`]*`", "", page().partition("-->")[2])
    assert re.findall(r"<\w+>", outside_of_code) == []


def test_every_setting_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    names = re.findall(r"^([\w.]+) = ", printed(capsys), re.MULTILINE)
    assert len(names) == len(set(names))
    assert {"name", "rloo.num_steps", "sft.optimizer.kind", "serve.gold_replica.dtype", "data.train.weight"} <= set(
        names
    )


def test_a_section_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    names = re.findall(r"^([\w.]+) = ", printed(capsys, "rloo.optimizer"), re.MULTILINE)
    assert "rloo.optimizer.learning_rate" in names
    assert all(name.startswith("rloo.optimizer.") for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rlo"], "error: No setting begins with 'rlo'. The nearest is rloo. The sections are name, seed, world, "),
        (["bsr"], "error: No setting begins with 'bsr'. The nearest are reward_model.bsr_"),
        (["rloo", "--markdown"], "error: --markdown prints the whole page; leave out rloo."),
    ],
)
def test_a_wrong_section_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main(parser.parse_args(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_the_toml_is_the_default_config_as_it_is_and_with_every_default_as_a_value(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    toml = printed(capsys, "--toml")
    written = uncommented(re.sub(r"(?m)^#\w+ =$", "", toml))
    assert written.count("\nlearning_rate = ") == 3
    for text in (toml, written):
        (tmp_path / "mine.toml").write_text(text)
        assert load_config(tmp_path / "mine.toml", []) == PipelineConfig(name="mine")


def test_a_table_that_is_left_out_by_default_can_be_taken_in(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    toml = printed(capsys, "reward_model.lora", "--toml")
    (tmp_path / "mine.toml").write_text('name = "mine"\n' + re.sub(r"(?m)^#(?=\[|\w+ = )", "", toml))
    assert load_config(tmp_path / "mine.toml", []).reward_model.lora == LoraConfig()


def test_the_meaning_of_each_setting_stands_above_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--toml").splitlines()
    settings = [index for index, line in enumerate(lines) if re.match(r"#?\w+ =", line)]
    assert len(settings) > 150
    assert [lines[index] for index in settings if not lines[index - 1].startswith("# ")] == []


def test_the_command_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from pipelines.settings import page, printed; page(); printed(None, toml=True, markdown=False); "
        "sys.exit(len({'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
