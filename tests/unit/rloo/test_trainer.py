"""A trainer without Ray or engines: KL, update and resume against plain transformers and formulas."""

import os
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rm_robust.cluster.environment import INTERFACE_VARIABLE
from rm_robust.config.run import PipelineConfig
from rm_robust.models.checkpoint import verify_checkpoint
from rm_robust.rloo.rollout import Completion, PromptCompletions, Update
from rm_robust.rloo.trainer import PolicyTrainer
from rm_robust.runs.layout import RunLayout
from tests.support.tiny_models import random_group, save_tiny_language_model

LEARNING_RATE = 0.5
ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_language_model(tmp_path_factory.mktemp("models") / "policy")


def sampled() -> list[PromptCompletions]:
    """Return three prompts with two completions each.

    The sampler's log-probabilities are made up: only the gap may depend on them.
    """
    rng = Random(0)
    groups = [random_group(rng, num_completions=2, max_prompt_tokens=30, max_completion_tokens=20) for _ in range(3)]
    return [
        PromptCompletions(
            str(i), g.prompt_ids, [Completion(ids, [-1.0] * len(ids), False, 0) for ids in g.completion_ids]
        )
        for i, g in enumerate(groups)
    ]


COMMON = {"temperature": 0.7, "importance_correction": "none", "num_prompts_per_step": 3}
"""Settings of all trainers here; without importance correction, because the sampler's log-probabilities are made up."""


def new_trainer(model_dir: Path, run_dir: Path, **rloo: Any) -> tuple[PolicyTrainer, int]:
    """Return a started trainer and the number of steps that it resumes after."""
    optimizer = {
        "kind": "sgd",
        "learning_rate": LEARNING_RATE,
        "warmup_fraction": 0,
        "schedule": "constant",
        "max_gradient_norm": 1e6,
    }
    values = {
        "name": "test",
        "model": {"path": str(model_dir)},
        "sft": {"enabled": False},
        "rloo": {**COMMON, "optimizer": optimizer, **rloo},
    }
    trainer = PolicyTrainer(PipelineConfig.model_validate(values), run_dir, rank=0)
    return trainer, trainer.start("127.0.0.1", 0)


def sequence_logprobs(model: torch.nn.Module) -> Tensor:
    """Return [N] sums of log-probabilities at temperature 0.7, from one plain forward pass per completion."""
    sums = []
    for prompt in sampled():
        for completion in prompt.completions:
            ids = completion.token_ids
            logits_TV = model(input_ids=torch.tensor([prompt.prompt_ids + ids])).logits[0] / 0.7
            sums.append(logits_TV[len(prompt.prompt_ids) - 1 : -1].log_softmax(-1)[range(len(ids)), ids].sum())
    return torch.stack(sums)


def weights(trainer: PolicyTrainer) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor.clone() for name, tensor in trainer.engine.full_state_dict().items()}


def update(trainer: PolicyTrainer, step: int = 0, *, learning_rate: float = LEARNING_RATE) -> Update:
    trainer.measure(sampled())
    return trainer.update(ADVANTAGES, step=step, num_completions_all_ranks=6, learning_rate=learning_rate)


def test_gloo_knows_the_interface_of_rays_address_when_a_trainer_has_started(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERFACE_VARIABLE, "before")  # so that the end of the test removes what the trainer sets
    monkeypatch.delenv(INTERFACE_VARIABLE)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    new_trainer(model_dir, tmp_path)
    assert "127.0.0.1" in [address.address for address in psutil.net_if_addrs()[os.environ[INTERFACE_VARIABLE]]]


def test_the_kl_to_the_reference_is_zero_before_the_first_update_and_not_after_it(
    model_dir: Path, tmp_path: Path
) -> None:
    trainer, _ = new_trainer(model_dir, tmp_path)
    assert trainer.measure(sampled()).kl == [0.0] * 6
    update(trainer)
    measured = trainer.measure(sampled()).kl
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    reference_N = sequence_logprobs(plain).detach()
    plain.load_state_dict(weights(trainer))
    assert measured == pytest.approx((sequence_logprobs(plain).detach() - reference_N).tolist(), abs=1e-4)
    assert max(map(abs, measured)) > 1e-2


@pytest.mark.parametrize("max_tokens", [8192, 64])
def test_an_update_is_one_gradient_step_on_all_completions(model_dir: Path, tmp_path: Path, max_tokens: int) -> None:
    """On policy the loss is -mean(A log pi); plain transformers give its gradient."""
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    (-(torch.tensor(ADVANTAGES) * sequence_logprobs(plain)).mean()).backward()
    trainer, _ = new_trainer(model_dir, tmp_path, max_tokens_per_micro_batch=max_tokens)
    report = update(trainer)
    assert len(trainer.policy.state_dict()) == len(before)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            (before[name] - weights(trainer)[name]) / LEARNING_RATE, parameter.grad, atol=2e-6, rtol=1e-4
        )
    assert report.loss == pytest.approx(-sum(ADVANTAGES) / 6, abs=1e-6)
    assert report.learning_rate == LEARNING_RATE
    assert report.gradient_norm == pytest.approx(
        sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None) ** 0.5, rel=1e-4
    )


def test_many_micro_batches_measure_the_same_as_one(model_dir: Path, tmp_path: Path) -> None:
    one, _ = new_trainer(model_dir, tmp_path)
    many, _ = new_trainer(model_dir, tmp_path, max_tokens_per_micro_batch=64)
    assert len({len(prompt.prompt_ids) for prompt in sampled()}) > 1
    for trainer in (one, many):
        update(trainer)
    a, b = one.measure(sampled()), many.measure(sampled())
    assert one._measured is not None
    assert many._measured is not None
    assert (one._measured.live is None, many._measured.live is None) == (False, True)
    assert b.kl == pytest.approx(a.kl, abs=1e-4)
    assert (b.entropy_mean, b.sampler_gap_mean, b.sampler_gap_max) == pytest.approx(
        (a.entropy_mean, a.sampler_gap_mean, a.sampler_gap_max), abs=1e-5
    )
    assert a.num_tokens == b.num_tokens == sum(len(c.token_ids) for p in sampled() for c in p.completions)


def test_a_step_of_two_epochs_of_minibatches_is_plain_ppo(model_dir: Path, tmp_path: Path) -> None:
    """The expected weights come from a loop on plain transformers with one prompt per minibatch.

    Every completion is in one minibatch of each epoch.
    """
    trainer, _ = new_trainer(model_dir, tmp_path, num_epochs_per_step=2, num_minibatches_per_epoch=3, clip_range=0.01)
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LEARNING_RATE)
    old_N, advantages_N = sequence_logprobs(plain).detach(), torch.tensor(ADVANTAGES)
    num_clipped = 0
    for epoch in range(2):
        order = [i for members in trainer._minibatches(3, 0, epoch) for i in members]
        assert sorted(order) == [0, 1, 2]
        for group in order:
            rows = [2 * group, 2 * group + 1]
            ratio_n = (sequence_logprobs(plain)[rows] - old_N[rows]).exp()
            terms_n = (-advantages_N[rows] * ratio_n).maximum(-advantages_N[rows] * ratio_n.clamp(0.99, 1.01))
            num_clipped += int((terms_n != -advantages_N[rows] * ratio_n).sum())
            optimizer.zero_grad()
            terms_n.mean().backward()
            optimizer.step()
    report = update(trainer)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(weights(trainer)[name], parameter.detach(), atol=1e-5, rtol=0)
    assert num_clipped > 0
    assert report.clip_fraction == pytest.approx(num_clipped / 12)


def test_the_learning_rate_is_the_schedules_times_the_factor(model_dir: Path, tmp_path: Path) -> None:
    trainer, _ = new_trainer(model_dir, tmp_path)
    assert update(trainer, learning_rate=LEARNING_RATE / 4).learning_rate == LEARNING_RATE / 4


def test_the_sampler_gap_is_the_distance_from_the_samplers_log_probabilities(model_dir: Path, tmp_path: Path) -> None:
    trainer, _ = new_trainer(model_dir, tmp_path, temperature=1.0)
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    gaps = []
    for prompt in sampled():
        for completion in prompt.completions:
            ids = completion.token_ids
            logits_TV = plain(input_ids=torch.tensor([prompt.prompt_ids + ids])).logits[0]
            gaps += (
                (logits_TV[len(prompt.prompt_ids) - 1 : -1].log_softmax(-1)[range(len(ids)), ids] + 1.0).abs().tolist()
            )
    measured = trainer.measure(sampled())
    assert measured.sampler_gap_mean == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
    assert measured.sampler_gap_max == pytest.approx(max(gaps), rel=1e-4)


def test_a_killed_trainer_resumes_from_its_last_saved_step(model_dir: Path, tmp_path: Path) -> None:
    uninterrupted, _ = new_trainer(model_dir, tmp_path / "uninterrupted")
    killed, first = new_trainer(model_dir, tmp_path / "killed")
    assert first == 0
    update(uninterrupted)
    update(killed)
    killed.save(1)
    resumed, first = new_trainer(model_dir, tmp_path / "killed")
    assert first == 1
    update(uninterrupted, step=1)
    update(resumed, step=1)
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(uninterrupted).items())
    assert resumed.measure(sampled()).kl == uninterrupted.measure(sampled()).kl


def test_the_committed_policy_is_a_verified_plain_transformers_model_with_the_new_weights(
    model_dir: Path, tmp_path: Path
) -> None:
    trainer, _ = new_trainer(model_dir, tmp_path)
    update(trainer)
    target = RunLayout(tmp_path).policy_checkpoint
    trainer.commit(target, 1)
    assert verify_checkpoint(target, "policy").training == {"stage": "rloo", "num_steps": 1, "seed": 0}
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in weights(trainer).items())
