"""RLOO against a reward model that exists already: what may be named, what is refused, and what a resumed run keeps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.stages import ALL_STAGES, REWARD_MODEL_STAGES, RLOO, rloo_requests, stages_of
from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.errors import ChatTemplateError, CheckpointError, ConfigError, DataError
from rm_robust.models.checkpoint import commit_checkpoint, read_manifest
from rm_robust.models.export import ending_at_the_score
from rm_robust.rloo.proxy import ProxyIdentity, check_proxy, policy_dir_now, record_proxy, require_policy
from rm_robust.runs.directory import RESOLVED_NAME
from rm_robust.runs.layout import RunLayout
from tests.support.rloo_run import rloo_config
from tests.support.tiny_reward_model import save_tiny_reward_model
from tests.unit.scoring.test_client import CHECKPOINT_A, refused, scored, serving


def with_proxy(folder: Path, proxy: Path | str, **rloo: Any) -> PipelineConfig:
    return rloo_config(folder, proxy=str(proxy), **rloo)


def policy_of(config: PipelineConfig) -> Path:
    assert config.model.path is not None
    return Path(config.model.path)


def test_a_checkpoint_and_the_run_that_trained_it_are_the_same_proxy(tmp_path: Path) -> None:
    run = tmp_path / "earlier"
    checkpoint = save_tiny_reward_model(RunLayout(run).reward_model_checkpoint)
    (run / RESOLVED_NAME).write_text("{}")
    identities = [
        check_proxy(config, tmp_path / "run", policy_dir=policy_of(config))
        for config in (with_proxy(tmp_path, checkpoint), with_proxy(tmp_path, run))
    ]
    assert [identity.checkpoint for identity in identities] == [read_manifest(checkpoint).content_sha256] * 2


def test_a_run_keeps_to_the_model_that_it_began_with_wherever_that_lies(tmp_path: Path) -> None:
    first, other = (save_tiny_reward_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    run_dir = tmp_path / "run"
    begun = with_proxy(tmp_path, first)
    identity = check_proxy(begun, run_dir, policy_dir=policy_of(begun))
    record_proxy(run_dir, identity)
    assert json.loads((run_dir / "rloo" / "proxy.json").read_text())["checkpoint"] == identity.checkpoint
    assert check_proxy(begun, run_dir, policy_dir=policy_of(begun)) == identity
    first.rename(tmp_path / "moved")
    assert check_proxy(with_proxy(tmp_path, tmp_path / "moved"), run_dir, policy_dir=None).checkpoint == (
        identity.checkpoint
    )
    with pytest.raises(ConfigError, match=f"is now {read_manifest(other).content_sha256}, .* {identity.checkpoint}"):
        check_proxy(with_proxy(tmp_path, other), run_dir, policy_dir=None)


def test_a_checkpoint_with_a_changed_file_or_of_a_policy_is_refused(tmp_path: Path) -> None:
    checkpoint = save_tiny_reward_model(tmp_path / "rm")
    config = with_proxy(tmp_path, checkpoint)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match="was altered after its commit"):
        check_proxy(config, tmp_path / "run", policy_dir=None)
    policy = tmp_path / "a_policy"
    commit_checkpoint(
        policy,
        lambda folder: (folder / "config.json").write_text("{}"),
        kind="policy",
        template_sha256="x",
        training={},
    )
    with pytest.raises(CheckpointError, match="is a policy checkpoint, and a reward_model is needed"):
        check_proxy(with_proxy(tmp_path, policy), tmp_path / "run", policy_dir=None)
    with pytest.raises(CheckpointError, match="There is no directory"):
        check_proxy(with_proxy(tmp_path, tmp_path / "nothing"), tmp_path / "run", policy_dir=None)


def greeting(chat: ChatFormat) -> ChatFormat:
    chat.tokenizer.chat_template = "{{- '' -}}" + chat.tokenizer.chat_template
    return ChatFormat(chat.tokenizer, source="other")


def with_template(checkpoint: Path, change: Callable[[ChatFormat], ChatFormat]) -> Path:
    """Commit a copy of a reward model with another template."""
    other = change(ChatFormat.load(checkpoint))

    def write(folder: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((checkpoint / name).read_bytes())
        other.tokenizer.save_pretrained(folder)

    target = checkpoint.with_name("other_template")
    commit_checkpoint(target, write, kind="reward_model", template_sha256=other.template_sha256, training={})
    return target


def test_another_chat_template_than_the_policys_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    other = with_template(save_tiny_reward_model(tmp_path / "rm"), greeting)
    config = with_proxy(tmp_path, other)
    ours = ChatFormat.load(policy_of(config)).template_sha256
    with pytest.raises(ChatTemplateError, match=rf'the policy in .* has {ours}\. .* rloo.proxy_template = "own"'):
        check_proxy(config, tmp_path / "run", policy_dir=policy_of(config))
    allowed = with_proxy(tmp_path, other, proxy_template="own")
    assert check_proxy(allowed, tmp_path / "run", policy_dir=policy_of(allowed)).template != ours


def test_a_service_is_asked_which_model_it_serves_and_must_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm_robust.scoring.client.FIRST_BACKOFF_S", 0.001)
    with serving(lambda _, inputs: scored([[1.0]])) as server:
        identity = check_proxy(with_proxy(tmp_path, server.url), tmp_path / "run", policy_dir=None)
        assert identity == ProxyIdentity(server.url, CHECKPOINT_A, None)
        record_proxy(tmp_path / "run", identity)
    with (
        serving(lambda _, inputs: scored([[1.0]], checkpoint="sha256:new")) as server,
        pytest.raises(ConfigError, match=f"is now sha256:new, .*{CHECKPOINT_A}"),
    ):
        check_proxy(with_proxy(tmp_path, server.url), tmp_path / "run", policy_dir=None)
    with (
        serving(lambda _, inputs: refused(401, "no key")) as server,
        pytest.raises(ConfigError, match=r"rloo.proxy = http.* does not score: .*HTTP 401: no key"),
    ):
        check_proxy(with_proxy(tmp_path, server.url), tmp_path / "run", policy_dir=None)
    with pytest.raises(DataError, match="holds a password"):
        check_proxy(with_proxy(tmp_path, "http://me:secret@127.0.0.1:1"), tmp_path / "run", policy_dir=None)


def test_a_policy_that_is_not_there_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    config = PipelineConfig.model_validate({"name": "x", "rloo": {"proxy": "somewhere"}})
    assert policy_dir_now(config, tmp_path, {}) is None
    with pytest.raises(CheckpointError, match="rm-robust train-sft"):
        require_policy(config, tmp_path)


def names(stages: Any) -> list[str]:
    return [stage.name for stage in stages]


def test_a_run_with_a_proxy_trains_no_reward_model_and_asks_for_no_replica_of_a_service(tmp_path: Path) -> None:
    config = with_proxy(tmp_path, "http://127.0.0.1:1")
    assert names(stages_of(config, ALL_STAGES)) == ["world", "sft", "rloo", "report"]
    assert names(stages_of(config, [RLOO])) == ["world", "rloo"], "RLOO's prompts come from the world"
    assert stages_of(config, REWARD_MODEL_STAGES) == list(REWARD_MODEL_STAGES), "they are asked for by their name"
    assert stages_of(rloo_config(tmp_path), ALL_STAGES) == list(ALL_STAGES)
    assert not [request for request in rloo_requests(config) if "proxy_replica" in request.setting]
    assert [request for request in rloo_requests(with_proxy(tmp_path, "rm")) if "proxy_replica" in request.setting]


def test_prompts_alone_are_enough_data_for_a_run_with_a_proxy() -> None:
    settings: dict[str, Any] = {
        "name": "x",
        "data": {"source": "prompts", "rloo_prompts": ["prompts.jsonl"]},
        "model": {"path": "policy"},
        "sft": {"enabled": False},
        "serve": {"gold": "gold"},
    }
    with pytest.raises(ValueError, match='data.source = "prompts" has no preferences .* set rloo.proxy'):
        PipelineConfig.model_validate(settings)
    assert PipelineConfig.model_validate(settings | {"rloo": {"proxy": "rm"}}).rloo.proxy == "rm"


def test_a_reward_model_that_was_trained_from_the_policy_has_its_template(tmp_path: Path) -> None:
    """A trained reward model is saved with a template that ends at the score; the policy's goes on with a newline."""
    trained = with_template(save_tiny_reward_model(tmp_path / "rm"), ending_at_the_score)
    config = with_proxy(tmp_path, trained)
    assert ChatFormat.load(policy_of(config)).text_after_turn == "\n"
    identity = check_proxy(config, tmp_path / "run", policy_dir=policy_of(config))
    assert identity.template != ChatFormat.load(policy_of(config)).template_sha256
