"""A command line becomes a claimed run directory. Every refusal names path, value and fix, and starts no Ray."""

import json
import threading
from pathlib import Path

import pytest

from pipelines.command import BY_NAME, parsed
from pipelines.driver import run_of
from rm_robust.config.loading import load_config
from rm_robust.errors import ConfigError
from rm_robust.runs import directory as run_directory
from rm_robust.runs.directory import (
    COPY_NAME,
    RESOLVED_NAME,
    RUN_ROOT_VARIABLE,
    choose_run_dir,
    claim_run_dir,
    in_ray_job,
    require_shared,
)

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    monkeypatch.delenv(RUN_ROOT_VARIABLE, raising=False)


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[rloo]\nnum_steps = 7\n')
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(path, list(overrides))
    return str(refused.value)


def test_overrides_win_over_the_file_at_any_depth_and_have_toml_types(config_path: Path) -> None:
    overrides = [
        "rloo.num_steps=9",
        "rloo.trainers.num_workers=2",
        "sft.optimizer.learning_rate=1e-3",
        "sft.enabled=true",
        "model.path=some/dir",
        'data.sft=["a.jsonl", "b.jsonl"]',
        "name=other-name",
    ]
    config = load_config(config_path, overrides)
    assert (config.rloo.num_steps, config.rloo.trainers.num_workers, config.sft.optimizer.learning_rate) == (9, 2, 1e-3)
    assert (config.model.path, config.data.sft, config.name) == ("some/dir", ["a.jsonl", "b.jsonl"], "other-name")


def test_the_last_of_two_overrides_wins(config_path: Path) -> None:
    assert load_config(config_path, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rloo.num_steps", ["--set 'rloo.num_steps'", "dotted.name=value"]),
        ("=3", ["--set '=3'"]),
        ("rloo.qqq=3", ["rloo.qqq: unknown key (value 3)", "spelling. `rm-robust settings rloo` lists the settings"]),
        (
            "rloo.num_stepz=3",
            ["rloo.num_stepz: unknown key", "The nearest is rloo.num_steps. `rm-robust settings rloo`"],
        ),
        ("rlo.num_steps=3", ["rlo: unknown key", "The nearest is rloo. `rm-robust settings` lists"]),
        ("num_engines=3", ["num_engines: unknown key", "rloo.num_engines"]),
        ('data.train=[{path="a", wieght=2}]', ["data.train.0.wieght: unknown key", "data.train.weight"]),
        ("rloo.num_steps=many", ["rloo.num_steps", "'many'", "valid integer"]),
        ("rloo.num_steps=0", ["rloo.num_steps", "0", "greater than or equal to 1"]),
        ("rloo.num_steps.deep=1", ["rloo.num_steps.deep=1", "num_steps is a value, not a section"]),
        (
            "rloo.num_completions_per_prompt=1",
            ["rloo.num_completions_per_prompt", "= 1", "Set rloo.num_completions_per_prompt >= 2"],
        ),
    ],
)
def test_a_wrong_override_is_refused_with_its_path_and_value(
    config_path: Path, override: str, parts: list[str]
) -> None:
    message = refusal(config_path, override)
    assert all(part in message for part in parts), message


def test_all_problems_are_listed_at_once(config_path: Path) -> None:
    config_path.write_text('name = "mine"\nseed = -1\n[sft]\nbatch_size = 0\n')
    message = refusal(config_path, "typo=1")
    assert message.startswith(f"{config_path} with the settings of the command line is not a valid config:\n")
    assert all(part in message for part in ("seed = -1", "typo: unknown key", "sft.batch_size = 0"))


def test_what_the_command_line_gives_is_not_blamed_on_the_file(config_path: Path) -> None:
    message = refusal(config_path, "seed=-1", "rloo.num_steps=many")
    assert str(config_path) not in message
    assert message.startswith("The command line gives what is not valid:\n  seed = -1: ")
    assert message.count("(given on the command line)") == 2
    config_path.write_text('name = "mine"\nseed = -1\n')
    (of_file, of_command) = [line for line in refusal(config_path, "sft.batch_size=0").splitlines()[1:]]
    assert of_file.startswith("  seed = -1")
    assert "command line" not in of_file
    assert of_command.startswith("  sft.batch_size = 0")
    assert of_command.endswith("(given on the command line)")
    assert refusal(config_path).startswith(f"{config_path} is not a valid config:\n")


@pytest.mark.parametrize("value", ["2024", "1e3", "true", "1979-05-27", "nan"])
def test_a_text_may_look_like_another_value(config_path: Path, value: str) -> None:
    config = load_config(config_path, [f"name={value}", f"model.path={value}", f"serve.gold={value}"])
    assert (config.name, config.model.path, config.serve.gold) == (value, value, value)
    assert load_config(config_path, [f'name="{value}"']).name == value


def test_a_missing_unreadable_or_nameless_file_is_refused_by_path(tmp_path: Path) -> None:
    assert f"no config file at {tmp_path}/nothing.toml" in refusal(tmp_path / "nothing.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "bad.toml", tmp_path / "binary.toml", tmp_path):
        assert f"{path} cannot be read as TOML" in refusal(path)
    (tmp_path / "empty.toml").touch()
    assert "name: Field required" in refusal(tmp_path / "empty.toml")


def test_a_run_goes_to_runs_below_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_run_dir("mine", None) == tmp_path / "runs" / "mine"
    assert choose_run_dir("mine", "here") == tmp_path / "here"
    monkeypatch.setenv(RUN_ROOT_VARIABLE, "root")
    assert choose_run_dir("mine", None) == tmp_path / "root" / "mine"


def test_inside_a_ray_job_a_relative_run_directory_is_refused_and_home_is_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.setenv("HOME", "/home/someone")
    assert in_ray_job()
    assert choose_run_dir("mine", None) == Path("/home/someone/rm_robust/runs/mine")
    assert choose_run_dir("mine", "~/there") == Path("/home/someone/there")
    with pytest.raises(ConfigError, match=r"--run-dir runs/mine is relative.*vanishes with the job.*absolute path"):
        choose_run_dir("mine", "runs/mine")
    monkeypatch.setenv(RUN_ROOT_VARIABLE, "root")
    with pytest.raises(ConfigError, match=f"{RUN_ROOT_VARIABLE}=root is relative"):
        choose_run_dir("mine", None)
    assert choose_run_dir("mine", str(tmp_path)) == tmp_path
    monkeypatch.setenv(RUN_ROOT_VARIABLE, str(tmp_path))
    assert choose_run_dir("mine", None) == tmp_path / "mine"


def test_the_job_variable_is_the_one_that_rays_job_supervisor_sets() -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert RAY_JOB_CONFIG_JSON_ENV_VAR == JOB_VARIABLE


def test_parsing_a_command_line_does_not_claim_the_run_directory(config_path: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "mine"
    arguments = ["--config", str(config_path), "--run-dir", str(run_dir)]
    run = run_of(parsed(BY_NAME["run"], arguments))
    assert (run.run_dir, run.config.rloo.num_steps) == (run_dir, 7)
    assert list(run_dir.iterdir()) == []
    claim_run_dir(run_dir, run.config)
    resolved = json.loads((run_dir / RESOLVED_NAME).read_text())
    assert (resolved["rloo"]["num_steps"], resolved["rloo"]["trainers"]["num_workers"]) == (7, 1)
    assert {path.name for path in run_dir.iterdir()} == {RESOLVED_NAME, COPY_NAME}
    run_of(parsed(BY_NAME["run"], [*arguments, "--set", "rloo.num_steps=8"]))
    assert json.loads((run_dir / RESOLVED_NAME).read_text()) == resolved, (
        "a job that is refused later must not replace the config of another job"
    )
    (run_dir / "world").mkdir()
    with pytest.raises(ConfigError, match=r"seed: 0 there, 8 now"):
        run_of(parsed(BY_NAME["run"], [*arguments, "--set", "seed=8"]))


def test_a_changed_config_is_refused_with_every_change_and_both_values(config_path: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    claim_run_dir(run_dir, load_config(config_path, []))
    (run_dir / "world").mkdir()
    with pytest.raises(ConfigError) as refused:
        claim_run_dir(run_dir, load_config(config_path, ["seed=8", "model.path=there", 'data.sft=["a"]']))
    message = str(refused.value)
    for line in (
        "seed: 0 there, 8 now",
        "model.path: None there, 'there' now",
        "data.sft: [] there, ['a'] now",
        "its own --run-dir",
    ):
        assert line in message
    assert message.count(" there, ") == 3
    claim_run_dir(run_dir, load_config(config_path, []))


def test_a_setting_that_an_earlier_version_did_not_have_is_a_change_only_beyond_its_default(
    config_path: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    claim_run_dir(run_dir, load_config(config_path, []))
    (run_dir / "stages").mkdir()
    resolved = run_dir / "config.resolved.json"
    earlier = json.loads(resolved.read_text())
    del earlier["sft"]["optimizer"]["weight_decay"]
    resolved.write_text(json.dumps(earlier))
    claim_run_dir(run_dir, load_config(config_path, []))
    with pytest.raises(ConfigError, match=r"sft.optimizer.weight_decay: 0.0 there, 0.5 now"):
        claim_run_dir(run_dir, load_config(config_path, ["sft.optimizer.weight_decay=0.5"]))
    resolved.write_text(json.dumps(earlier | {"gone": 1}))
    with pytest.raises(ConfigError, match=r"gone: 1 there, None now"):
        claim_run_dir(run_dir, load_config(config_path, []))


def test_a_run_that_was_refused_before_it_began_leaves_its_directory_to_the_corrected_config(
    config_path: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".writer.lock").touch()
    for num_steps in (8, 9):
        claim_run_dir(run_dir, load_config(config_path, [f"rloo.num_steps={num_steps}"]))
        assert json.loads((run_dir / RESOLVED_NAME).read_text())["rloo"]["num_steps"] == num_steps


def test_an_unusable_run_directory_is_refused_by_path(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load_config(config_path, [])
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"{run_dir} cannot be used.*--run-dir"):
            claim_run_dir(run_dir, config)
    (tmp_path / RESOLVED_NAME).write_text("{")
    with pytest.raises(ConfigError, match="cannot be used"):
        claim_run_dir(tmp_path, config)


def test_a_run_directory_that_a_node_does_not_see_is_refused_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "SEEN_WITHIN_S", 0.0)
    with pytest.raises(
        ConfigError,
        match=f"does not see {tmp_path}/absent/config.*{RUN_ROOT_VARIABLE} or --run-dir to a shared file system",
    ):
        require_shared(tmp_path / "absent" / "config.json")


def test_a_node_that_sees_it_a_little_later_goes_on(tmp_path: Path) -> None:
    late = threading.Timer(0.3, (tmp_path / "late").touch)
    late.start()
    require_shared(tmp_path / "late")
    assert (tmp_path / "late").exists()
