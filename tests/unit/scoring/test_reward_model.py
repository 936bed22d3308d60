"""A reward model in this process: scores as plain transformers gives them, wherever it lies, and one-line errors."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from rm_robust import RewardModel
from rm_robust.data.records import Message
from rm_robust.errors import CheckpointError, ConfigError, DataError, RefusedInputError, RmRobustError
from rm_robust.models.adopt import adopt
from rm_robust.models.checkpoint import MANIFEST_NAME
from rm_robust.runs import files as run_files
from rm_robust.runs.directory import RESOLVED_NAME
from rm_robust.runs.storage.copies import CACHE_VARIABLE
from rm_robust.runs.storage.filesystems import filesystem_of
from tests.support.plain_transformers import PlainTransformers
from tests.support.s3_server import S3Server, s3_server
from tests.support.tiny_reward_model import NUM_POSITIONS, save_tiny_reward_model

TOLERANCE = 1e-5
PROMPT = "Name a colour."
COMPLETIONS = ["Blue.", "the quiet river is not seven", "", "Blue."]
CONVERSATION = [
    {"role": "user", "content": "List the red apple."},
    {"role": "assistant", "content": "the red apple"},
    {"role": "user", "content": "and the green stone, please"},
]
STORED_RUN = "s3://models/deep/mine"
LIGHT = "import sys; sys.modules.update(dict.fromkeys(('torch', 'ray', 'transformers', 'pyarrow', 'numpy')))"
"""Code after which a process finds only what the light installation has."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run directory with a reward model, and nothing else that loading it could need."""
    run_dir = tmp_path_factory.mktemp("runs") / "mine"
    save_tiny_reward_model(run_dir / "checkpoints" / "reward_model", weight_scale=1)
    return run_dir


@pytest.fixture(scope="module")
def checkpoint_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "reward_model"


@pytest.fixture(scope="module")
def plain(checkpoint_dir: Path) -> PlainTransformers:
    return PlainTransformers(checkpoint_dir)


@pytest.fixture(scope="module")
def reward_model(run_dir: Path) -> RewardModel:
    return RewardModel.load(run_dir)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Start an object store that this process reaches with s3:// URIs; its copies go to the test's folder."""
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        server.put("models", {})
        filesystem_of.cache_clear()
        yield server
        filesystem_of.cache_clear()


@pytest.mark.parametrize("prompt", [PROMPT, CONVERSATION], ids=["text", "messages"])
def test_scores_are_those_of_plain_transformers_in_the_order_of_the_completions(
    reward_model: RewardModel, plain: PlainTransformers, prompt: str | list[Message]
) -> None:
    scores = reward_model.score(prompt, COMPLETIONS)
    assert scores == pytest.approx([plain.score(prompt, text) for text in COMPLETIONS], abs=TOLERANCE)
    assert max(scores) - min(scores) > 100 * TOLERANCE
    assert all(type(score) is float for score in scores)
    assert scores[::-1] == pytest.approx(reward_model.score(prompt, COMPLETIONS[::-1]), abs=TOLERANCE)


def test_a_text_is_one_user_turn_and_any_sequence_of_texts_is_scored(reward_model: RewardModel) -> None:
    one_turn = [{"role": "user", "content": PROMPT}]
    assert reward_model.score(PROMPT, tuple(COMPLETIONS)) == reward_model.score(one_turn, COMPLETIONS)


def test_a_checkpoint_is_loaded_like_its_run(checkpoint_dir: Path, reward_model: RewardModel) -> None:
    for path in (checkpoint_dir, f"{checkpoint_dir}/"):
        assert RewardModel.load(path).score(PROMPT, COMPLETIONS) == reward_model.score(PROMPT, COMPLETIONS)


def test_an_adopted_model_is_loaded(checkpoint_dir: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "foreign", tmp_path / "adopted"
    shutil.copytree(checkpoint_dir, source, ignore=shutil.ignore_patterns(MANIFEST_NAME))
    template = (source / "chat_template.jinja").read_text()
    # An adopted model's template ends with the end-of-turn token.
    (source / "chat_template.jinja").write_text(template.replace("'<|im_end|>' + '\\n'", "'<|im_end|>'"))
    adopt(source, target)
    expected = [PlainTransformers(target).score(CONVERSATION, text) for text in COMPLETIONS]
    assert RewardModel.load(target).score(CONVERSATION, COMPLETIONS) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("uri", [STORED_RUN, f"{STORED_RUN}/", f"{STORED_RUN}/checkpoints/reward_model"])
def test_a_uri_of_a_run_or_of_a_checkpoint_is_fetched_from_the_store(
    store: S3Server, plain: PlainTransformers, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_reward_model(run_files.locate(f"{STORED_RUN}/checkpoints/reward_model"), weight_scale=1)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "another node"))
    expected = [plain.score(PROMPT, text) for text in COMPLETIONS]
    assert RewardModel.load(uri).score(PROMPT, COMPLETIONS) == pytest.approx(expected, abs=TOLERANCE)


def test_a_uri_without_a_reward_model_is_named_with_what_to_do(store: S3Server) -> None:
    with refused(CheckpointError) as error:
        RewardModel.load(STORED_RUN)
    assert f"There is no committed reward model in {STORED_RUN}, nor in {STORED_RUN}/checkpoints" in str(error.value)
    assert f"train-reward-model --config CONFIG --run-dir {STORED_RUN}" in str(error.value)


def refused(kind: type[RmRobustError]) -> pytest.RaisesExc[RmRobustError]:
    """Expect an error of exactly this kind, whose message is one line."""
    return pytest.RaisesExc(kind, check=lambda error: type(error) is kind and len(str(error).splitlines()) == 1)


def test_a_path_without_a_reward_model_is_named_with_what_to_do(tmp_path: Path, checkpoint_dir: Path) -> None:
    run_dir, foreign, empty = tmp_path / "run", tmp_path / "foreign", tmp_path / "empty"
    run_dir.mkdir()
    (run_dir / RESOLVED_NAME).write_text("{}")
    shutil.copytree(checkpoint_dir, foreign, ignore=shutil.ignore_patterns(MANIFEST_NAME))
    empty.mkdir()
    for path, message in {
        tmp_path / "gone": f"There is no directory {tmp_path}/gone",
        checkpoint_dir / MANIFEST_NAME: "There is no directory ",
        run_dir: f"train-reward-model --config CONFIG --run-dir {run_dir}`",
        foreign: f"`rm-robust adopt {foreign} TARGET` makes a checkpoint of it",
        empty: f"There is no committed reward model in {empty}, nor in {empty}/checkpoints/reward_model",
    }.items():
        with refused(CheckpointError) as error:
            RewardModel.load(path)
        assert message in str(error.value)


def test_a_checkpoint_of_another_kind_and_an_altered_one_are_refused(checkpoint_dir: Path, tmp_path: Path) -> None:
    policy, altered = tmp_path / "sft", tmp_path / "altered"
    for copy in (policy, altered):
        shutil.copytree(checkpoint_dir, copy)
    manifest = json.loads((policy / MANIFEST_NAME).read_text())
    (policy / MANIFEST_NAME).write_text(json.dumps(manifest | {"kind": "policy"}))
    (altered / "more.txt").write_text("more")
    for path, message in {policy: "sft is a policy checkpoint, and a reward_model is", altered: "was altered"}.items():
        with refused(CheckpointError) as error:
            RewardModel.load(path)
        assert message in str(error.value)


@pytest.mark.parametrize("path", [None, 7, ["runs/mine"], b"runs/mine"])
def test_what_is_no_path_is_refused(path: object) -> None:
    with refused(ConfigError) as error:
        RewardModel.load(path)  # type: ignore[arg-type]
    assert f"needs a path or a URI, got {path!r}" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(run_dir: Path) -> None:
    with refused(ConfigError) as error:
        RewardModel.load(run_dir, device="cuda")
    assert "device='cuda' cannot be used" in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "completions", "message"),
    [
        (PROMPT, [], "completions is empty"),
        (PROMPT, "Blue.", "must be a list of texts, got 'Blue.'"),
        (PROMPT, 7, "must be a list of texts, got 7"),
        (PROMPT, {"Blue."}, "must be a list of texts, got {'Blue.'}"),
        (PROMPT, ["Blue.", 7], r"completions[1] must be a text, got 7"),
        (7, ["Blue."], "A prompt must be text or a list of messages, got a int"),
        ("", ["Blue."], "The last user message of a prompt is empty"),
        ([], ["Blue."], "A prompt needs at least one message"),
        ([{"role": "user"}], ["Blue."], "Message 0 must be"),
        (CONVERSATION[:2], ["Blue."], "must end with a user message"),
    ],
)
def test_what_is_no_prompt_and_no_list_of_texts_is_refused(
    reward_model: RewardModel, prompt: object, completions: object, message: str
) -> None:
    with refused(DataError) as error:
        reward_model.score(prompt, completions)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_a_text_that_is_too_long_is_refused_with_the_limit(reward_model: RewardModel) -> None:
    with refused(RefusedInputError) as error:
        reward_model.score(PROMPT, ["Blue.", "river " * NUM_POSITIONS])
    assert re.search(rf"has \d+ tokens .*the limit is {NUM_POSITIONS}\.", str(error.value))


def printed_by(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_the_package_imports_nothing_heavy_and_has_the_name_alone() -> None:
    code = (
        "import sys, rm_robust; loaded = set(sys.modules); rm_robust.RewardModel; "
        "print({'pydantic', 'torch', 'ray', 'transformers'} & loaded, {'torch', 'ray'} & set(sys.modules), "
        "rm_robust.__all__, hasattr(rm_robust, 'RewardModels'))"
    )
    assert printed_by(code) == "set() set() ['RewardModel'] False"


def test_the_light_installation_says_in_one_line_what_to_install() -> None:
    code = f"""
{LIGHT}
from rm_robust import RewardModel
from rm_robust.errors import ConfigError
try:
    RewardModel.load("runs/mine")
except ConfigError as error:
    print(error)
"""
    (line,) = printed_by(code).splitlines()
    assert re.match(r"RewardModel needs (ray|torch), which is not installed: this is the scoring client alone\. ", line)
    assert "`make install`" in line
    assert "EXTRA=gpu" in line


def test_loading_shows_no_bar_and_leaves_the_bars_of_the_callers_program_as_they_are(
    run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers_logging.enable_progress_bar()
    RewardModel.load(run_dir)
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        RewardModel.load(run_dir)
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()
