"""Time of training: arithmetic, the memory traffic and calls of other operators, and communication.

    compute_s = FLOPs / (peak x utilisation) + activation bytes / activation rate
                + operator calls x cost of a call + update bytes / memory rate

On a GPU, the second and third terms are part of `utilisation`. On CPUs, attention goes text by text, and its calls have
a cost of their own. Sizes: N devices, P parameters, T tokens of one device in one step, M of them predicted.
"""

from dataclasses import dataclass

from research.scaling.hardware import Hardware
from research.scaling.memory import FLOAT_BYTES, Trained
from research.scaling.shapes import ModelShape
from rm_robust.config.shared import ComputeConfig, StrategyConfig

TRAFFIC_FORWARD = (152.5, 45.3, 20.6, 166)
TRAFFIC_BACKWARD = (461.9, 70.1, 34.4, 100)
"""The bytes that a layer's operators read and write of a token in float32, without matrix products and attention.

The four values are per unit of H, per unit of the width of keys, per unit of I, and per head. They were counted, as
memory.SAVED_BYTES_FLOAT32 was.
"""
LOGIT_TRAFFIC = (44, 32)
"""The same bytes for the logits of a predicted token and their backward pass, per vocabulary entry."""
LAYER_CALLS = (82, 153)
"""The operators that a layer calls without attention, views included, in a forward and a backward pass."""
COMPLETION_CALLS = (4, 19)
"""The operators that attention calls for a completion in a layer. On CPUs, attention goes text by text."""
SHARED_PROMPT_CALLS = (11, 19)
"""The operators that attention calls in a layer for a prompt that several completions share."""
UPDATE_BYTES = 32
"""The bytes that AdamW reads and writes for each trained weight.

It reads weight, gradient and two moments, writes all but the gradient, and reads the gradient once more for its norm.
"""
FORWARD_FLOPS, BACKWARD_FLOPS = 2, 4
"""The operations per weight and token (Kaplan et al. 2020, section 2.1)."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one device in one optimiser step."""

    num_tokens: float
    """All tokens. A prompt counts once."""
    visible: float
    """The mean number of tokens that a token attends to."""
    num_groups: float
    """Prompts, each with its completions."""
    num_completions_per_prompt: int = 1
    num_predicted: float = 0
    """Tokens whose logits a policy computes."""
    num_micro_batches: int = 1
    num_scored: float | None = None
    """Tokens at which the whole last layer is computed; the other tokens get keys and values alone. None: all tokens.

    rm_robust/models/last_layer.py does this on CPUs.
    """


@dataclass(frozen=True)
class Passes:
    """How often a step computes each token."""

    num_forward: float
    num_backward: float
    num_frozen: float = 0
    """Forward passes of a second model that is not trained."""


def passes_of_step(compute: ComputeConfig, *, is_batch_coupled: bool, num_micro_batches: int) -> Passes:
    """Return the passes of a step of SFT or of a reward model.

    There is one forward and one backward pass. Checkpointed activations need another forward pass. An objective that
    couples a batch of more than one micro-batch needs one without gradient (rm_robust/training/reward_model/step.py).
    """
    recomputed = 1 if compute.gradient_checkpointing else 0
    scored_first = 1 if is_batch_coupled and num_micro_batches > 1 else 0
    return Passes(1 + recomputed + scored_first, 1)


def forward_flops(shape: ModelShape, tokens: Tokens) -> float:
    """Return the operations of one forward pass (Kaplan et al. 2020, table 1).

    Matrix products need 2 per weight and token, and attention 4 x visible x width of the queries per token; the logits
    of the predicted tokens are added. The embedding is only looked up. A reward model's head, H weights per completion,
    is left out. A completion's last token sees twice the average.
    """
    layer = FORWARD_FLOPS * shape.matrix_parameters_per_layer + 4 * tokens.visible * shape.query_width
    last = layer * tokens.num_tokens
    if tokens.num_scored is not None:
        keys_and_values = FORWARD_FLOPS * shape.kv_parameters_per_layer
        last = (
            keys_and_values * tokens.num_tokens
            + (layer - keys_and_values + 4 * tokens.visible * shape.query_width) * tokens.num_scored
        )
    return (
        (shape.num_layers - 1) * layer * tokens.num_tokens
        + last
        + FORWARD_FLOPS * shape.embedding_parameters * tokens.num_predicted
    )


def step_flops(shape: ModelShape, tokens: Tokens, passes: Passes) -> float:
    """Return the operations of one device in one step. A backward pass needs as many as two forward passes."""
    return forward_flops(shape, tokens) * (
        passes.num_forward + passes.num_frozen + passes.num_backward * BACKWARD_FLOPS / FORWARD_FLOPS
    )


def layers_of_activations(shape: ModelShape, tokens: Tokens) -> float:
    """Return the number of layers whose operators other than matrix products a token passes, on average.

    Keys and values alone count by their share of the weights.
    """
    if tokens.num_scored is None:
        return shape.num_layers
    share = shape.kv_parameters_per_layer / shape.matrix_parameters_per_layer
    return shape.num_layers - 1 + share + (1 - share) * tokens.num_scored / tokens.num_tokens


def compute_seconds(
    trained: Trained, tokens: Tokens, passes: Passes, hardware: Hardware, *, num_updates: int = 1
) -> float:
    """Return the seconds that one device computes in one step, without communication."""
    shape, num_forward = trained.shape, passes.num_forward + passes.num_frozen
    sizes = (shape.hidden_size, shape.kv_width, shape.intermediate_size, shape.num_heads)
    forward, backward = (
        sum(factor * size for factor, size in zip(factors, sizes, strict=True))
        for factors in (TRAFFIC_FORWARD, TRAFFIC_BACKWARD)
    )
    activations = (
        layers_of_activations(shape, tokens)
        * tokens.num_tokens
        * (num_forward * forward + passes.num_backward * backward)
    )
    logits = (
        shape.vocab_size
        * tokens.num_predicted
        * (num_forward * LOGIT_TRAFFIC[0] + passes.num_backward * LOGIT_TRAFFIC[1])
    )
    calls = num_forward * layer_calls(tokens, 0) + passes.num_backward * layer_calls(tokens, 1)
    forward_s, backward_s = (
        attention_calls(tokens, direction) * hardware.attention_call_s[direction] for direction in (0, 1)
    )
    return (
        step_flops(shape, tokens, passes) / (hardware.peak_flops_per_s * hardware.utilisation)
        + (activations + logits) / hardware.activation_bytes_per_s
        + shape.num_layers * (calls * hardware.kernel_s + num_forward * forward_s + passes.num_backward * backward_s)
        + num_updates * UPDATE_BYTES * trained.num_trained / hardware.memory_bytes_per_s
    )


def layer_calls(tokens: Tokens, direction: int) -> float:
    """Return the operators that a step calls in one layer, without attention's.

    `direction` is 0 for a forward pass and 1 for a backward pass.
    """
    return tokens.num_micro_batches * LAYER_CALLS[direction]


def attention_calls(tokens: Tokens, direction: int) -> float:
    """Return the operators that attention calls in one layer, text by text."""
    completions = tokens.num_groups * tokens.num_completions_per_prompt
    shared = tokens.num_groups if tokens.num_completions_per_prompt > 1 else 0
    return completions * COMPLETION_CALLS[direction] + shared * SHARED_PROMPT_CALLS[direction]


def sent_bytes(
    trained: Trained, strategy: StrategyConfig, *, num_devices: int, num_micro_batches: int, num_first_passes: int
) -> float:
    """Return the bytes that one device sends in a step.

    In a ring, an all-reduce of S bytes sends 2 (N-1)/N S, and an all-gather or a reduce-scatter sends (N-1)/N S
    (Rajbhandari et al. 2020, section 7). DDP reduces once per step. FSDP2 and ZeRO-3 gather the weights for the forward
    pass and again for the backward pass of every micro-batch, and scatter its gradients; a first pass without gradient
    gathers them once. ZeRO-1 and ZeRO-2 scatter the gradients of every micro-batch, because this repository does not
    tell DeepSpeed about accumulation, and gather the weights once per step.
    """
    weights, gradients = FLOAT_BYTES * trained.num_parameters, FLOAT_BYTES * trained.num_trained
    share = (num_devices - 1) / num_devices
    if strategy.kind == "ddp":
        return 2 * share * gradients
    if strategy.kind == "deepspeed" and strategy.zero_stage < 3:
        return share * (num_micro_batches * gradients + gradients)
    return share * num_micro_batches * ((2 + num_first_passes) * weights + gradients)


def step_seconds(compute_s: float, communication_s: float, strategy: StrategyConfig) -> float:
    """Return the seconds of a step.

    DDP and FSDP2 communicate while they compute, at best. DeepSpeed does not (overlap_comm = False).
    """
    return compute_s + communication_s if strategy.kind == "deepspeed" else max(compute_s, communication_s)
