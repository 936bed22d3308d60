"""The samples that the RLOO loop writes itself."""

from pathlib import Path

import pytest
import torch

from rm_robust.data.chat import ChatFormat
from rm_robust.data.token_files import read_token_groups
from rm_robust.errors import StorageError
from rm_robust.rloo.advantages import StepScores
from rm_robust.rloo.controller import Controller
from rm_robust.rloo.rollout import Completion, PromptCompletions
from rm_robust.runs.layout import RunLayout
from tests.support.full_storage import files_of_at_most
from tests.support.rloo_run import rloo_config, rloo_run_dir


def test_a_full_disk_under_the_samples_is_one_error_that_names_the_file(tmp_path: Path) -> None:
    config = rloo_config(tmp_path)
    layout = RunLayout(rloo_run_dir(config, tmp_path / "run", num_prompts=1))
    controller = object.__new__(Controller)  # without actors: this test needs none
    controller.settings, controller.layout, controller.version = config.rloo, layout, 1
    controller.chat = ChatFormat.load(str(config.model.path))
    prompts = read_token_groups(layout.rloo_prompts / "scenario=rloo_prompts")
    completion = Completion(
        token_ids=[controller.chat.end_of_turn_id], sampler_logprobs=[0.0], is_truncated=False, policy_version=0
    )
    completions = [PromptCompletions("p0", [1], [completion])]
    scores = StepScores({"proxy": [[0.5]]}, None, torch.tensor([[0.5]]), {}, {}, 0)
    controller.keep_samples(prompts, completions, scores)
    with (
        pytest.raises(StorageError, match=f"^{layout.rloo_samples} could not be written: File too large.*Make room"),
        files_of_at_most(10),
    ):
        controller.keep_samples(prompts, completions, scores)
