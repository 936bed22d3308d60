"""The policy loss: a pure function. Shapes: N completions."""

from torch import Tensor


def clipped_policy_loss_terms(new_logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, *, clip_range: float) -> Tensor:
    """Per-completion max(-A r, -A clip(r, 1 - c, 1 + c)) with the sequence ratio r = exp(sum log pi_new - sum log pi_old), [N].

    Schulman et al. 2017, Eq. 7, on whole completions as the paper's code has it. The step's loss is the mean over all N of all ranks.
    """
    ratio_N = (new_logprobs_N - old_logprobs_N).exp()
    clipped_N = ratio_N.clamp(1 - clip_range, 1 + clip_range)
    return (-advantages_N * ratio_N).maximum(-advantages_N * clipped_N)
