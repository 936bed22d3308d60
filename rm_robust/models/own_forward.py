"""Check at load that a packed model computes what transformers computes with the same weights.

A short conversation goes through our packed forward pass, and through the model's own forward pass with transformers'
eager attention, the reference for all of its kernels. A family whose attention, positions or head we do not compute is
thereby refused before any work, and its error names the first layer that differs.

The check sees a conversation of some forty tokens. What begins with longer texts (sliding windows, positions that
depend on the length) is decided by `packing.choose_layout` from the config.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.errors import CheckpointError
from rm_robust.models.armorm import PackedArmoRM
from rm_robust.models.compute import EXACT
from rm_robust.models.packing import Layout, PackedBatch, completion_logits, hidden_states, lay_out, prepare_backbone
from rm_robust.models.policy import PackedPolicy
from rm_robust.models.reward_model import PackedRewardModel, score_head

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference, |ours - own| / |own| in the 2-norm, that kernels of a number format may have."""
PROMPT = "Name two colours."
COMPLETIONS = ("Red and blue.", "I don't know.", "No")


def check_policy(policy: PackedPolicy, chat: ChatFormat) -> None:
    """Raise CheckpointError unless the policy's logits are those of the model's own forward pass."""
    group = probe_conversation(chat)
    model = policy.model
    with torch.no_grad(), own_attention(model, policy.layout):
        own_MV = torch.cat(
            [model(input_ids=row, use_cache=False).logits[0, start - 1 : -1] for start, row in rows_of(group, model)]
        ).float()
    with torch.no_grad():
        ours_MV = completion_logits(model, _batch(group, policy.layout, model)).float()
    own_MV, ours_MV = (logits - logits.mean(-1, keepdim=True) for logits in (own_MV, ours_MV))
    _require_same(
        "logits", ours_MV, own_MV, scale=float(own_MV.norm()), model=model, layout=policy.layout, prompt=group
    )


def check_reward_model(packed: PackedRewardModel, chat: ChatFormat) -> None:
    """Raise CheckpointError unless the scores are those of the model's own forward pass."""
    group = probe_conversation(chat)
    model = packed.model
    with torch.no_grad(), own_attention(model, packed.layout), _head_in_dtype_of(model):
        own_N = torch.cat([model(input_ids=row, use_cache=False).logits[:, 0] for _, row in rows_of(group, model)])
    with torch.no_grad():
        scored = packed.score(_batch(group, packed.layout, model), EXACT)
    weight_norm, hidden = score_head(model).weight.norm(), scored.hidden_after_final_norm_NH
    typical = weight_norm * hidden.norm() / hidden.shape[1] ** 0.5  # the scores of a state in a random direction
    scale = max(float(own_N.float().norm()), float(typical))
    _require_same(
        "scores", scored.scores_N, own_N.float(), scale=scale, model=model, layout=packed.layout, prompt=group
    )


def check_armorm(packed: PackedArmoRM, chat: ChatFormat) -> None:
    """Raise CheckpointError unless ArmoRM's decoder gives the hidden states of transformers' own decoder.

    transformers does not know its heads, so they have no forward pass of their own to compare with.
    """
    group, backbone = probe_conversation(chat), packed.backbone
    with torch.no_grad(), own_attention(backbone, packed.layout):
        own_NH = torch.cat(
            [backbone(input_ids=row, use_cache=False).last_hidden_state[:, -1] for _, row in rows_of(group, backbone)]
        ).float()
    with torch.no_grad():
        batch = _batch(group, packed.layout, backbone)
        ours_NH = hidden_states(backbone, batch)[batch.scored_index_N].float()
    _require_same(
        "hidden states", ours_NH, own_NH, scale=float(own_NH.norm()), model=backbone, layout=packed.layout, prompt=group
    )


def probe_conversation(chat: ChatFormat) -> TokenGroup:
    """Return the token ids of the conversation that the checks compute."""
    return chat.token_group(PROMPT, COMPLETIONS)


def rows_of(group: TokenGroup, model: PreTrainedModel) -> list[tuple[int, Tensor]]:
    """Return each completion's row [1, T] and the column at which the completion starts."""
    return [
        (len(group.prompt_ids), torch.tensor([group.prompt_ids + ids], device=model.device))
        for ids in group.completion_ids
    ]


@contextlib.contextmanager
def own_attention(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Let the model run with transformers' eager attention, and with that of `layout` again afterwards."""
    backbone = model.base_model
    assert isinstance(backbone, PreTrainedModel)
    backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        prepare_backbone(backbone, layout)


def _head_in_dtype_of(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Let the model's own code apply our float32 head to the states of a 16-bit decoder, by torch's autocast."""
    if model.dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=model.dtype)


def _batch(group: TokenGroup, layout: Layout, model: PreTrainedModel) -> PackedBatch:
    # the pad id fills columns that no completion sees, so any id does
    return lay_out([group], layout, pad_id=group.prompt_ids[0]).to(model.device)


def _require_same(
    what: str, ours: Tensor, own: Tensor, *, scale: float, model: PreTrainedModel, layout: Layout, prompt: TokenGroup
) -> None:
    if not own.isfinite().all():
        raise CheckpointError(
            f"{model.name_or_path} ({type(model).__name__}) computes {what} that are not finite, with its own code in "
            f"transformers too. A weight is damaged, or too large for {model.dtype}: save the model again, or use "
            "another number format."
        )
    difference = float((ours - own).norm()) / scale
    if difference <= TOLERANCE[model.dtype]:  # false for NaN too
        return
    raise CheckpointError(
        f"{model.name_or_path} ({type(model).__name__}) gets other {what} from rm_robust than from its own code in "
        f"transformers: they differ by {difference:.2g} of their size, and {TOLERANCE[model.dtype]:g} is allowed for "
        f"{model.dtype}. The first difference is in {_first_difference(model, layout, prompt)}. Use a model of a "
        "family that the documentation lists."
    )


def _first_difference(model: PreTrainedModel, layout: Layout, group: TokenGroup) -> str:
    """Return the name of the first decoder layer whose output differs from that of the model's own code."""
    backbone, single = model.base_model, TokenGroup(group.prompt_ids, group.completion_ids[:1])
    with torch.no_grad(), own_attention(model, layout):
        own = _outputs_of_layers(backbone, lambda: backbone(input_ids=rows_of(single, model)[0][1], use_cache=False))
    with torch.no_grad():
        ours = _outputs_of_layers(backbone, lambda: hidden_states(backbone, _batch(single, layout, model)))
    for name, states_TH in own.items():
        if float((ours[name] - states_TH).norm()) > TOLERANCE[model.dtype] * float(states_TH.norm()):
            return name
    return "the head, or in the attention to a prompt that completions share"


def _outputs_of_layers(backbone: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Run a forward pass and return the output [T, H] of each decoder layer, by its name and class."""
    assert isinstance(backbone, PreTrainedModel)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states = output[0] if isinstance(output, tuple) else output
            outputs[name] = states.flatten(0, -2).float()

        return hook

    whole = backbone._no_split_modules or ()
    layers = [(name, module) for name, module in backbone.named_modules() if type(module).__name__ in whole]
    handles = [module.register_forward_hook(keep(f"{name} ({type(module).__name__})")) for name, module in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs
