"""Mistakes of a user: each gives one `error:` that names path, value and fix, and a non-zero exit without traceback.

This happens before Ray starts.
"""

import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from rm_robust.data.demonstrations import save_base_model
from rm_robust.models.checkpoint import commit_checkpoint
from rm_robust.runs.directory import in_ray_job
from tests.e2e.conftest import Launcher
from tests.e2e.pipeline_process import REPOSITORY, SMOKE_CONFIG
from tests.e2e.user_data import TINY, pairs, save_tiny_model, tiny_tokenizer, write_config, write_rows
from tests.support.tiny_reward_model import save_tiny_reward_model

FULL = "pipelines/full_rlhf.py"


@dataclass(frozen=True)
class UserFiles:
    """A complete set of a user's files. All are correct until a test breaks one."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "own.toml"

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def gold(self) -> Path:
        return self.folder / "gold"

    def arguments(self) -> list[str]:
        return ["--config", str(self.config), "--run-dir", str(self.folder / "run")]


@pytest.fixture
def user_files(tmp_path: Path) -> UserFiles:
    files = UserFiles(tmp_path)
    write_rows(files.train, pairs(40))
    held_out = write_rows(tmp_path / "in_domain.jsonl", pairs(20, seed=1))
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs(8, seed=2)])
    save_tiny_model(files.model, tiny_tokenizer())
    save_tiny_reward_model(files.gold)
    data: dict[str, object] = {
        "source": "scenarios",
        "train": [str(files.train)],
        "in_domain": [str(held_out)],
        "rloo_prompts": [str(prompts)],
    }
    write_config(files.config, name="own", data=data, model_dir=files.model, gold=files.gold)
    return files


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[[list[str]], str]:
    """Return a function that runs a pipeline's script in this process, and returns its one error message.

    A process for each would be slow: the script's imports take longer than its checks.
    """

    def run(arguments: list[str]) -> str:
        ray_dir = tmp_path / "ray"
        ray_dir.mkdir()
        monkeypatch.setenv("RAY_TMPDIR", str(ray_dir))
        monkeypatch.setattr(sys, "argv", [FULL, *arguments])
        with pytest.raises(SystemExit) as exit_of_script:
            runpy.run_path(str(REPOSITORY / FULL), run_name="__main__")
        assert exit_of_script.value.code == 2
        assert not ray.is_initialized()
        assert not list(ray_dir.iterdir()), "Ray was started"
        return the_error(capfd.readouterr().err)

    return run


def the_error(output: str) -> str:
    """Return the text of the only error in a pipeline's output."""
    assert "Traceback" not in output
    assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1, output
    return output.partition("error: ")[2]


def test_a_missing_config_file(launcher: Launcher) -> None:
    """This is the only case here that starts the script as a person does."""
    refused = launcher.pipeline("full_rlhf.py", "--config", "/nowhere/my.toml")
    assert refused.wait() == 2
    message = the_error(refused.output())
    assert "There is no config file at /nowhere/my.toml" in message
    assert "Correct --config" in message
    assert not list(launcher.ray_dir.iterdir())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rloo.num_stepz=3", ["rloo.num_stepz: unknown key (value 3)", "check the spelling"]),
        (
            "reward_model.optimizer.learning_rate=-1.0",
            ["reward_model.optimizer.learning_rate = -1.0", "greater than 0"],
        ),
        (
            "rloo.num_completions_per_prompt=1",
            ["at least 2 completions per prompt to form a baseline, got 1", "Set rloo.num_completions_per_prompt >= 2"],
        ),
        (
            "reward_model.batch_size=1",
            ["reward_model.batch_size = 1", "reward_model.workers.num_workers = 2", "raise the one or lower the other"],
        ),
        ("rloo.num_steps", ["--set 'rloo.num_steps' must look like dotted.name=value"]),
        ("name.first=x", ["--set 'name.first=x': name is a value, not a section"]),
    ],
)
def test_a_value_that_cannot_be(
    refusal: Callable[[list[str]], str], tmp_path: Path, override: str, expected: list[str]
) -> None:
    message = refusal(
        ["--config", str(REPOSITORY / SMOKE_CONFIG), "--run-dir", str(tmp_path / "run"), "--set", override]
    )
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_no_toml(refusal: Callable[[list[str]], str], tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    config.write_text("name: my run\n")
    message = refusal(["--config", str(config)])
    assert f"{config} cannot be read as TOML" in message
    assert "line 1" in message


def test_a_missing_data_file(refusal: Callable[[list[str]], str], user_files: UserFiles) -> None:
    user_files.train.unlink()
    assert f"There is no file or folder at {user_files.train}" in refusal(user_files.arguments())


def test_an_empty_data_file(refusal: Callable[[list[str]], str], user_files: UserFiles) -> None:
    user_files.train.write_text("")
    assert f"{user_files.train} (train) is empty" in refusal(user_files.arguments())


def test_a_data_file_of_an_unknown_format(refusal: Callable[[list[str]], str], user_files: UserFiles) -> None:
    csv = user_files.train.rename(user_files.folder / "train.csv")
    user_files.config.write_text(user_files.config.read_text().replace("train.jsonl", "train.csv"))
    message = refusal(user_files.arguments())
    assert f"{csv} must be a .jsonl, .json or .parquet file" in message


def test_a_model_that_is_not_there(refusal: Callable[[list[str]], str], user_files: UserFiles) -> None:
    user_files.model.rename(user_files.folder / "moved")
    assert str(user_files.model) in refusal(user_files.arguments())


def test_a_model_without_a_chat_template(refusal: Callable[[list[str]], str], user_files: UserFiles) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (user_files.model / "chat_template.jinja").unlink()
    save_tiny_model(user_files.model, tokenizer)
    message = refusal(user_files.arguments())
    assert f"The tokenizer in {user_files.model} has no chat template" in message
    assert "tokenizer.chat_template = " in message


def test_a_model_without_a_pad_token(refusal: Callable[[list[str]], str], user_files: UserFiles) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    save_tiny_model(user_files.model, tokenizer)
    message = refusal(user_files.arguments())
    assert f"The tokenizer in {user_files.model} has no pad token" in message
    assert "Set tokenizer.pad_token" in message


def test_a_policy_checkpoint_as_gold_judge(refusal: Callable[[list[str]], str], user_files: UserFiles) -> None:
    policy = user_files.folder / "policy"
    commit_checkpoint(
        policy,
        lambda folder: save_base_model(folder, TINY, tiny_tokenizer(), seed=0),
        kind="policy",
        template_sha256="",
        training={},
    )
    message = refusal([*user_files.arguments(), "--set", f'serve.gold="{policy}"'])
    assert f"{policy} is a policy checkpoint, and a reward_model is needed" in message


def test_a_gold_judge_that_is_no_checkpoint(refusal: Callable[[list[str]], str], user_files: UserFiles) -> None:
    message = refusal([*user_files.arguments(), "--set", f'serve.gold="{user_files.model}"'])
    assert f"{user_files.model} has no rm_robust_manifest.json" in message


@pytest.mark.parametrize("parent", ["a_file/run", "/proc/1/run"])
def test_a_run_directory_that_cannot_be_written(
    refusal: Callable[[list[str]], str], tmp_path: Path, parent: str
) -> None:
    """One directory is below a regular file, and the other where even root cannot make folders."""
    (tmp_path / "a_file").write_text("")
    run_dir = tmp_path / parent
    message = refusal(["--config", str(REPOSITORY / SMOKE_CONFIG), "--run-dir", str(run_dir)])
    assert f"The run directory {run_dir} cannot be used" in message
    assert "Choose another with --run-dir" in message


@pytest.mark.parametrize(("arguments", "root"), [(["--run-dir", "runs/mine"], None), ([], "relative/runs")])
def test_a_relative_run_directory_inside_a_ray_job(
    refusal: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], root: str | None
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert in_ray_job()
    if root:
        monkeypatch.setenv("RM_ROBUST_RUN_ROOT", root)
    message = refusal(["--config", str(REPOSITORY / SMOKE_CONFIG), *arguments])
    assert (root or "runs/mine") in message
    assert "vanishes with the job. Give an absolute path" in message


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_too_many_malformed_rows(user_files: UserFiles, launcher: Launcher) -> None:
    """Only reading the data finds such rows, so this test starts Ray."""
    lines = user_files.train.read_text().splitlines()
    lines[7], lines[21] = '{"prompt": "red", "chosen": "blue"}', "not JSON"
    user_files.train.write_text("\n".join(lines) + "\n")
    refused = launcher.pipeline("prepare_preferences.py", *user_files.arguments())
    assert refused.wait() == 2
    message = the_error(refused.output())
    assert (
        f"2 of 40 rows of 'train' ({user_files.train}) are malformed, more than data.max_dropped_fraction = 0.01"
        in message
    )
    assert "Fix the rows, or raise the fraction" in message
    assert not (user_files.folder / "run" / "stages").exists()
    assert not (user_files.folder / "run" / "preferences" / "tokens").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_disk_that_fills_up_while_a_worker_commits_its_state(launcher: Launcher, tmp_path: Path) -> None:
    """The disk is real: it has 1.6 MB, in a mount namespace.

    It has room for everything before the state (1 MB), but not for the state (1.4 MB).
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    in_a_namespace = (
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "bash",
        "-c",
        'mount -t tmpfs -o size=1600k tmpfs "$0" && exec "$@"',
        str(disk),
    )
    if shutil.which("unshare") is None or launcher.command(*in_a_namespace, "true").wait():
        pytest.skip("this machine allows no mount namespace, so the test cannot make a disk that fills up")
    run = launcher.command(
        *in_a_namespace,
        sys.executable,
        "pipelines/train_sft.py",
        "--config",
        SMOKE_CONFIG,
        "--run-dir",
        str(disk / "run"),
    )
    assert run.wait() == 2, run.output()[-3000:]
    assert f"{disk}/run/sft/state could not be written: " in the_error(run.output())
    assert "bytes are free there" in the_error(run.output())
    assert run.output().count("rm_robust.errors.StorageError: ") == 1, "no worker is started again"
