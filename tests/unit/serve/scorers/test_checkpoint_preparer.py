"""Test how requests become token ids.

Many completions become several work items, and a tokenizer that is not the replica's is refused.
"""

from pathlib import Path

import pytest

from rm_robust.data.records import TokenGroup
from rm_robust.errors import CheckpointError
from rm_robust.models.checkpoint import read_manifest
from rm_robust.scoring.contract import ScoreInput, ScoreRequest
from serve.scorers.checkpoint_preparer import CheckpointPreparer
from serve.work import Prepared, ServedModel
from tests.support.tiny_reward_model import save_tiny_reward_model


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_reward_model(tmp_path_factory.mktemp("models") / "tiny")


def served(checkpoint_dir: Path, *, max_batch_tokens: int) -> ServedModel:
    manifest = read_manifest(checkpoint_dir)
    folder = str(checkpoint_dir)
    return ServedModel(
        "tiny",
        manifest.content_sha256,
        manifest.template_sha256,
        256,
        checkpoint_dir=folder,
        max_batch_tokens=max_batch_tokens,
    )


def test_a_prompt_with_more_completions_than_a_batch_holds_is_several_items_in_their_order(
    checkpoint_dir: Path,
) -> None:
    texts = ["red " * (index % 7) for index in range(40)]
    request = ScoreRequest(
        inputs=[ScoreInput(prompt="blue", completions=["one"]), ScoreInput(prompt="green stone", completions=texts)]
    )
    whole = CheckpointPreparer(served(checkpoint_dir, max_batch_tokens=10_000)).prepare(request)
    split = CheckpointPreparer(served(checkpoint_dir, max_batch_tokens=90)).prepare(request)
    assert isinstance(whole, Prepared)
    assert isinstance(split, Prepared)
    assert [item.input_index for item in whole.items] == [0, 1]
    assert len(split.items) >= 4
    assert all(item.num_tokens <= 90 for item in split.items)
    completions: list[list[int]] = []
    for item in split.items[1:]:
        assert isinstance(item.content, TokenGroup)
        assert item.input_index == 1
        completions += item.content.completion_ids
    assert isinstance(whole.items[1].content, TokenGroup)
    assert completions == whole.items[1].content.completion_ids
    assert split.counts == whole.counts


@pytest.mark.parametrize(("num_words", "least"), [(1, 24), (40, 150)])
def test_a_large_request_is_parts_of_about_a_batch_each_that_repeat_a_long_prompt_rarely(
    checkpoint_dir: Path, num_words: int, least: int
) -> None:
    request = ScoreRequest(inputs=[ScoreInput(prompt=" ".join(["red"] * num_words), completions=["blue"] * 200)])
    prepared = CheckpointPreparer(served(checkpoint_dir, max_batch_tokens=32)).prepare(request)
    assert isinstance(prepared, Prepared)
    num_prompt = prepared.items[0].num_prompt_tokens
    most = max(32 - num_prompt, 4 * num_prompt)
    assert all(most - 4 < item.num_completion_tokens <= most for item in prepared.items[:-1])
    assert most >= least
    assert (
        sum(len(item.content.completion_ids) for item in prepared.items if isinstance(item.content, TokenGroup)) == 200
    )


def test_a_completion_longer_than_a_batch_is_an_item_of_its_own(checkpoint_dir: Path) -> None:
    request = ScoreRequest(inputs=[ScoreInput(prompt="blue", completions=["red " * 60, "one", "red " * 60])])
    prepared = CheckpointPreparer(served(checkpoint_dir, max_batch_tokens=40)).prepare(request)
    assert isinstance(prepared, Prepared)
    assert len(prepared.items) == 3


def test_a_directory_that_is_not_what_the_replica_loaded_is_refused(checkpoint_dir: Path) -> None:
    other = save_tiny_reward_model(checkpoint_dir.parent / "other", seed=1)
    was = served(checkpoint_dir, max_batch_tokens=50)
    moved = ServedModel(was.model, was.checkpoint, was.template, 256, checkpoint_dir=str(other), max_batch_tokens=50)
    with pytest.raises(CheckpointError, match="is no longer the checkpoint"):
        CheckpointPreparer(moved)
