"""Check a language model's directory before any work: its kind, its files, its sizes and its tokenizer.

It reads config.json, the tokenizer and the headers of the safetensors files, and no weight, so it takes a second. What
it refuses would otherwise fail hours later, in a training worker or in vLLM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rm_robust.data.chat import ChatFormat
from rm_robust.errors import CheckpointError
from rm_robust.models.checkpoint import read_json

LANGUAGE_MODEL = ("ForCausalLM", "LMHeadModel")
"""The endings of the names that transformers gives to decoders with an output over the vocabulary."""
ONE_SCORE = "ForSequenceClassification"
"""The ending of the names that transformers gives to decoders with one linear head."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""The number formats of safetensors in which weights can be trained."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""The endings of the names of token embeddings, as decoders of transformers call them."""
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """What the header of a safetensors file says about one tensor."""

    dtype: str
    shape: tuple[int, ...]


def check_language_model(
    folder: Path, label: str, *, load_chat: Callable[[Path], ChatFormat], is_policy: bool
) -> PreTrainedConfig:
    """Check that a directory holds a decoder that can be trained here, and return its config.

    `label` names the setting and its value in messages. A policy needs an output over the vocabulary; what a reward
    model starts from does not. Raises CheckpointError or ChatTemplateError, in one line.
    """
    config = check_kind(folder, label, is_policy=is_policy)
    tensors = check_weights(folder, label)
    check_output_layer(config, tensors, label, is_policy=is_policy)
    check_vocabulary(config, tensors, load_chat(folder), label)
    return config


def check_kind(folder: Path, label: str, *, is_policy: bool) -> PreTrainedConfig:
    """Return the config of a directory, after checking that it holds a decoder of text in plain numbers.

    Raises CheckpointError for an adapter, an encoder, a model of two parts, one of images or sounds, a quantised one,
    and one that transformers does not know.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{label} holds an adapter, not a whole model. {merge_advice(folder)}")
    values = read_json(folder / "config.json")
    if method := quantisation_of(values):
        raise CheckpointError(
            f"{label} is quantised ({method}), and quantised weights cannot be trained. Name the model that it was "
            "made from."
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a config's own checks raise errors of many kinds
        raise CheckpointError(
            f"{label} has a config.json that transformers cannot read ({_first_line(error)}). Name a model of an "
            "architecture that transformers has itself."
        ) from error
    architectures = [str(name) for name in values.get("architectures") or []]
    shown = ", ".join(architectures) or str(config.model_type)
    if kind := other_kind(config, architectures):
        raise CheckpointError(f"{label} is {kind} ({shown}). Name a decoder of text, a …ForCausalLM of transformers.")
    endings = LANGUAGE_MODEL if is_policy else (*LANGUAGE_MODEL, ONE_SCORE)
    if architectures and not all(name.endswith(endings) for name in architectures):
        raise CheckpointError(
            f"{label} has the architecture {shown}. Name a decoder of text "
            f"({' or '.join('…' + ending for ending in endings)}) of transformers."
        )
    return config


def quantisation_of(values: dict[str, object]) -> str | None:
    """Return the method with which a config.json says that its weights are quantised; None for plain numbers."""
    settings = values.get("quantization_config")
    if not settings:
        text = values.get("text_config")
        settings = text.get("quantization_config") if isinstance(text, dict) else None
    if not settings:
        return None
    return str(settings.get("quant_method", "quantization_config")) if isinstance(settings, dict) else str(settings)


def other_kind(config: PreTrainedConfig, architectures: Sequence[str]) -> str | None:
    """Return what a model is if it is no decoder of text, or None if it may be one."""
    if config.is_encoder_decoder:
        return "a model of an encoder and a decoder"
    parts = [name for name in ("vision_config", "audio_config", "image_token_id") if hasattr(config, name)]
    is_text_alone = any(name.endswith(LANGUAGE_MODEL) for name in architectures) and not parts
    if parts and not is_text_alone:
        return "a model of more than text"
    is_decoder = bool(getattr(config, "is_decoder", False))
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        return "an encoder, which reads a text in both directions"
    return None


def check_weights(folder: Path, label: str) -> dict[str, Tensor]:
    """Return the header of every tensor of a directory's safetensors files; empty where it holds torch's own files.

    Raises CheckpointError for a directory without weights, for a missing, damaged or truncated file, and for numbers
    that cannot be trained.
    """
    names = weight_files(folder, label)
    if not names and not any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{label} holds no weights (model.safetensors). Download or copy the whole model.")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_header(folder / name, label)
    named = read_json(folder / INDEX_NAME).get("weight_map", {}) if (folder / INDEX_NAME).is_file() else {}
    if lost := sorted(set(named) - set(tensors)):
        raise CheckpointError(
            f"{label} lacks {len(lost)} of the tensors that {INDEX_NAME} names, the first of them {lost[0]}. "
            "Download or copy the whole model."
        )
    packed = sorted({tensor.dtype for name, tensor in tensors.items() if "weight" in name.rpartition(".")[2]})
    if others := [dtype for dtype in packed if dtype not in FLOATS]:
        raise CheckpointError(
            f"{label} has weights in {', '.join(others)}, and only {', '.join(FLOATS)} can be trained. Name the model "
            "that it was made from."
        )
    return tensors


def weight_files(folder: Path, label: str) -> list[str]:
    """Return the names of a directory's safetensors files, after checking that those its index names are there."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX_NAME).is_file():
        return [path.name for path in [folder / "model.safetensors"] if path.is_file()]
    named = sorted({str(name) for name in read_json(folder / INDEX_NAME).get("weight_map", {}).values()})
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{label} lacks {len(missing)} of its {len(named)} weight files: {', '.join(missing[:3])}. "
            "Download or copy the whole model."
        )
    return named


def read_header(path: Path, label: str) -> dict[str, Tensor]:
    """Return what a safetensors file says about its tensors. Raises CheckpointError for a damaged or truncated file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Tensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        hint = " It is a Git LFS pointer: run `git lfs pull` there." if size < 1024 else ""
        raise CheckpointError(
            f"{label}: {path.name} ({size} bytes) is damaged or truncated ({_first_line(error)}).{hint} "
            "Download or copy it again."
        ) from error


def check_output_layer(config: PreTrainedConfig, tensors: dict[str, Tensor], label: str, *, is_policy: bool) -> None:
    """Raise CheckpointError for a policy whose output layer is neither in the files nor tied to its embedding."""
    text = config.get_text_config()
    if not is_policy or not tensors or text.tie_word_embeddings:
        return
    model = untrained(text)
    output = next((name for name, part in model.named_modules() if part is model.get_output_embeddings()), None)
    if output is not None and not any(name.endswith(f"{output}.weight") for name in tensors):
        raise CheckpointError(
            f"{label} has tie_word_embeddings = false and no {output}.weight in its files, so its output layer would "
            "be random. If the embedding is its output layer, set tie_word_embeddings to true in its config.json; "
            "otherwise copy the whole model."
        )


def check_vocabulary(config: PreTrainedConfig, tensors: dict[str, Tensor], chat: ChatFormat, label: str) -> None:
    """Check that every token id that a text, a template or padding can have, has a row of the embedding.

    A special token that the template does not write cannot come from text. transformers adds some of that kind to a
    tokenizer that has none, by the model's type. Raises CheckpointError with the first id that has no row.
    """
    num_rows = int(config.get_text_config().vocab_size)
    for name, tensor in tensors.items():
        if name.endswith(EMBEDDINGS) and tensor.shape[0] != num_rows:
            raise CheckpointError(
                f"{label} has an embedding of {tensor.shape[0]} rows ({name}), and vocab_size = {num_rows} in its "
                "config.json. Save model and config together (model.save_pretrained)."
            )
    written = {chat.pad_id, chat.end_of_turn_id, *chat.header_ids, *chat.bos_ids}
    unwritten = {index for index, token in chat.tokenizer.added_tokens_decoder.items() if token.special} - written
    beyond = {
        token: index
        for token, index in chat.tokenizer.get_vocab().items()
        if index >= num_rows and index not in unwritten
    }
    if beyond:
        first = min(beyond, key=lambda token: beyond[token])
        what = "the pad token" if chat.pad_id >= num_rows else f"{len(beyond)} tokens"
        raise CheckpointError(
            f"{label} has an embedding of {num_rows} rows, and its tokenizer has {what} beyond it "
            f"({first!r} is {beyond[first]}). Give them rows: {resize_command(chat.source)}"
        )
    ids = {name: getattr(config.get_text_config(), name, None) for name in ("pad_token_id", "bos_token_id")}
    for name, index in ids.items():
        if isinstance(index, int) and not 0 <= index < num_rows:
            raise CheckpointError(
                f"{label} has {name} = {index} in its config.json, and an embedding of {num_rows} rows. "
                "Set it to the tokenizer's own id, or to null."
            )


def unmatched_targets(config: PreTrainedConfig, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return those of the names that match no linear layer of the decoder as PEFT matches them, and the known names.

    PEFT itself passes over a name that matches nothing if another one matches.
    """
    model = untrained(config.get_text_config())
    output = model.get_output_embeddings()
    names = [name for name, part in model.named_modules() if is_linear(part) and part is not output]
    unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    return unmatched, sorted({name.rpartition(".")[2] for name in names})


def is_linear(part: nn.Module) -> bool:
    """Return whether PEFT gives the module adapters by its name: torch's linear layer, or GPT-2's."""
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def untrained(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the language model of a config without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def merge_advice(folder: Path) -> str:
    """Return how to make a whole model of a PEFT adapter, with the base that it names."""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return (
        f'Name its base, {base}, or merge it: python -c "from peft import AutoPeftModelForCausalLM as M; from '
        f"transformers import AutoTokenizer as T; M.from_pretrained('{folder}').merge_and_unload()"
        f".save_pretrained('MERGED'); T.from_pretrained('{base}').save_pretrained('MERGED')\""
    )


def resize_command(folder: Path | str) -> str:
    """Return a command that gives every token of a tokenizer a row of its model's embedding."""
    return (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"m, t = M.from_pretrained('{folder}'), T.from_pretrained('{folder}'); "
        f"m.resize_token_embeddings(len(t)); m.save_pretrained('RESIZED'); t.save_pretrained('RESIZED')\", "
        "and name RESIZED."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
