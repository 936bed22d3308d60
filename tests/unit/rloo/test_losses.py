"""The policy loss: case by case, against REINFORCE on policy, against TRL, and with a stale sampler."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rm_robust.config.rloo import RlooConfig
from rm_robust.rloo.advantages import advantages_of, sequence_kl
from rm_robust.rloo.losses import importance_weights, policy_loss


def settings(**changed: Any) -> RlooConfig:
    return RlooConfig(**{"clip_range": 0.2, **changed})


def term(log_ratio: float, advantage: float, **changed: Any) -> tuple[float, float]:
    """Return the loss term of a completion of one token, and its gradient by the new log-probability."""
    new_M = torch.tensor([log_ratio - 3.0], requires_grad=True)
    old_M = torch.tensor([-3.0])
    loss = policy_loss(new_M, old_M, old_M, torch.tensor([advantage]), torch.tensor([0]), settings(**changed))
    loss.terms_N.sum().backward()
    assert new_M.grad is not None
    return loss.terms_N.item(), new_M.grad.item()


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the clip range: -A r
        (1.5, 2.0, -2.4, 0.0),  # a better completion is already likelier: clipped at 1.2, no gradient
        (0.5, 2.0, -1.0, -1.0),  # a better completion is less likely: not clipped
        (1.5, -2.0, 3.0, 3.0),  # a worse completion is likelier: not clipped
        (0.5, -2.0, 1.6, 0.0),  # a worse completion is already less likely: clipped at 0.8
    ],
)
def test_the_term_is_the_worse_of_ratio_and_clipped_ratio(
    ratio: float, advantage: float, expected: float, gradient: float, level: str
) -> None:
    assert term(math.log(ratio), advantage, ratio_level=level) == pytest.approx((expected, gradient), abs=1e-5)


@given(advantage=st.floats(-10, 10, width=32))
def test_on_policy_the_gradient_is_that_of_reinforce(advantage: float) -> None:
    """REINFORCE's gradient is minus the advantage times the gradient of the log-probability."""
    assert term(0.0, advantage) == pytest.approx((-advantage, -advantage), abs=1e-5)


def random_step(num_prompts: int, num_completions: int, *, seed: int) -> dict[str, Tensor]:
    """Return log-probabilities of completions of 1 to 6 tokens: old near the sampler's, new near old."""
    generator = torch.Generator().manual_seed(seed)
    lengths_N = torch.randint(1, 7, (num_prompts * num_completions,), generator=generator)
    num_tokens = int(lengths_N.sum())

    def near(base_M: Tensor, distance: float) -> Tensor:
        return base_M + distance * torch.randn(num_tokens, generator=generator, dtype=torch.float64)

    sampler_M = -3 * torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    old_M = near(sampler_M, 0.1)
    return {
        "owner_M": torch.arange(len(lengths_N)).repeat_interleave(lengths_N),
        "sampler_M": sampler_M,
        "old_M": old_M,
        "new_M": near(old_M, 0.1).requires_grad_(),
        "reference_M": near(sampler_M, 0.5),
        "scores_PK": 2 * torch.randn(num_prompts, num_completions, generator=generator, dtype=torch.float64),
        "truncated_PK": torch.zeros(num_prompts, num_completions, dtype=torch.bool),
    }


def trl_loss(step: dict[str, Tensor], *, beta: float, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute KL, advantages and loss as TRL 1.16.0 does, on padded rows.

    From trl/trainer/rloo_trainer.py: KL and advantages are lines 1656-1699, the loss is lines 1822-1833.
    """
    num_prompts, num_completions = step["scores_PK"].shape
    count = num_prompts * num_completions
    lengths = torch.bincount(step["owner_M"], minlength=count)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]

    def padded(values_M: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=values_M.dtype).masked_scatter(mask, values_M)

    old_per_token_logps, ref_per_token_logps = padded(step["old_M"]), padded(step["reference_M"])
    kl = ((old_per_token_logps - ref_per_token_logps) * mask).sum(-1)
    rewards = step["scores_PK"].flatten() - beta * kl
    grouped_rewards = rewards.view(-1, num_completions)
    scorable_counts = (~torch.isnan(grouped_rewards)).sum(dim=1, keepdim=True)
    grouped_sum = torch.nansum(grouped_rewards, dim=1, keepdim=True)
    baselines = ((grouped_sum - grouped_rewards) / (scorable_counts - 1)).view(-1)
    advantages = torch.nan_to_num(rewards - baselines, nan=0.0)
    logps, old_logps = (padded(step["new_M"]) * mask).sum(1), (old_per_token_logps * mask).sum(1)
    coef_1 = torch.exp(logps - old_logps)
    coef_2 = torch.clamp(coef_1, 1 - epsilon, 1 + epsilon)
    return kl, advantages, -torch.min(coef_1 * advantages, coef_2 * advantages).mean()


@pytest.mark.parametrize("has_failed_scores", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_kl_advantages_and_loss_are_those_of_trls_rloo_trainer(seed: int, has_failed_scores: bool) -> None:
    step = random_step(6, 4, seed=seed)
    if has_failed_scores:
        step["scores_PK"][1, 2] = step["scores_PK"][4, 0] = step["scores_PK"][4, 3] = torch.nan
    chosen = settings(kl_coefficient=0.07, importance_correction="none")
    kl_N = sequence_kl(step["old_M"], step["reference_M"], step["owner_M"], 24, estimator="k1")
    advantages_PK = advantages_of(
        step["scores_PK"], kl_N.view(6, 4), step["truncated_PK"], chosen, kl_coefficient=0.07
    ).advantages_PK
    terms_N = policy_loss(
        step["new_M"], step["old_M"], step["sampler_M"], advantages_PK.flatten(), step["owner_M"], chosen
    ).terms_N
    (gradient_M,) = torch.autograd.grad(terms_N.mean(), step["new_M"])
    expected_kl, expected_advantages, expected_loss = trl_loss(step, beta=0.07, epsilon=0.2)
    (expected_gradient_M,) = torch.autograd.grad(expected_loss, step["new_M"])
    for actual, expected in [
        (kl_N, expected_kl),
        (advantages_PK.flatten(), expected_advantages),
        (terms_N.mean(), expected_loss),
        (gradient_M, expected_gradient_M),
    ]:
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_every_completion_of_every_prompt_carries_gradient() -> None:
    """The paper's code loses half of them (PAPER.md 8.2)."""
    step = random_step(5, 4, seed=0)
    advantages_PK = advantages_of(
        step["scores_PK"], torch.zeros(5, 4), step["truncated_PK"], settings(), kl_coefficient=0.0
    ).advantages_PK
    terms_N = policy_loss(
        step["old_M"].requires_grad_(),
        step["old_M"].detach(),
        step["sampler_M"],
        advantages_PK.flatten(),
        step["owner_M"],
        settings(),
    ).terms_N
    (gradient_M,) = torch.autograd.grad(terms_N.sum(), step["old_M"])
    assert all(bool((gradient_M[step["owner_M"] == n] != 0).all()) for n in range(20))


@pytest.mark.parametrize("correction", ["sequence", "token"])
def test_a_stale_sampler_gets_the_gradient_of_the_policy_as_it_is_now(correction: str) -> None:
    """For one token from a sampler q, E_q[p/q A grad log p] = E_p[A grad log p]; without p/q it is another vector."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    sampler_logprobs = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), 0)
    advantages = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)

    def expected_gradient(weights: Tensor, chosen: RlooConfig) -> Tensor:
        policy_logits = logits.clone().requires_grad_()
        new = torch.log_softmax(policy_logits, 0)
        old = new.detach()
        terms = policy_loss(
            new, old, sampler_logprobs if weights is sampler_logprobs else old, advantages, torch.arange(3), chosen
        ).terms_N
        (gradient,) = torch.autograd.grad((weights.exp() * terms).sum(), policy_logits)
        return gradient

    on_policy = expected_gradient(torch.log_softmax(logits, 0), settings())
    level = "token" if correction == "token" else "sequence"
    corrected = expected_gradient(
        sampler_logprobs, settings(importance_correction=correction, ratio_level=level, importance_cap=100)
    )
    torch.testing.assert_close(corrected, on_policy)
    assert not torch.allclose(
        expected_gradient(sampler_logprobs, settings(importance_correction="none")), on_policy, atol=1e-2
    )


def test_importance_weights_are_capped_and_have_no_gradient() -> None:
    old_M = torch.tensor([0.0, -1.0, -2.0], requires_grad=True)
    weights = importance_weights(
        old_M, torch.tensor([-3.0, -1.0, -1.0]), torch.tensor([0, 1, 1]), 2, settings(importance_cap=1.5)
    )
    assert weights.tolist() == pytest.approx([1.5, math.exp(-1)])
    assert not weights.requires_grad


def test_the_share_of_clipped_ratios_counts_those_whose_gradient_is_gone() -> None:
    new_M, old_M = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-2.0, -1.0, -1.0])
    loss = policy_loss(new_M, old_M, old_M, torch.tensor([1.0, 1.0, 1.0]), torch.arange(3), settings())
    assert loss.clipped_N.tolist() == [1.0, 0.0, 0.0]
