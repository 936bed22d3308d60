"""Find out which reward model a directory holds, and load it.

A directory whose head is not known is refused. It is never loaded with the head of another model.
"""

from pathlib import Path

import torch

from rm_robust.data.chat import ChatFormat
from rm_robust.errors import CheckpointError
from rm_robust.models import armorm
from rm_robust.models.armorm import PackedArmoRM, load_armorm
from rm_robust.models.checkpoint import read_json
from rm_robust.models.own_forward import check_armorm, check_reward_model
from rm_robust.models.packing import choose_layout
from rm_robust.models.reward_model import PackedRewardModel, load_reward_model

ScoringModel = PackedRewardModel | PackedArmoRM

ONE_SCORE = "ForSequenceClassification"
"""The ending of the names that transformers gives to decoders with one linear head."""
PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""The endings of files that are read by unpickling, which can run code."""
LEFT_BY_TRAINING = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""Pickled files that transformers' Trainer leaves beside a model, and that nothing reads to compute a score."""


def load_packed_reward_model(
    checkpoint_dir: Path, chat: ChatFormat, *, dtype: torch.dtype, device: torch.device
) -> ScoringModel:
    """Return the model that config.json names, ready to score on `device`.

    Raises CheckpointError for a model that is not known or not complete, and for one whose scores here are not those of
    its own code in transformers.
    """
    if known_architecture(checkpoint_dir) == armorm.ARCHITECTURE:
        multi_objective = load_armorm(checkpoint_dir, chat, dtype=dtype)
        layout = choose_layout(multi_objective.model.config, device)
        armorm_model = PackedArmoRM(multi_objective, layout, chat.header_ids).to(device).eval()
        check_armorm(armorm_model, chat)
        return armorm_model
    model = load_reward_model(checkpoint_dir, dtype=dtype)
    packed = PackedRewardModel(model, choose_layout(model.config, device)).to(device).eval()
    check_reward_model(packed, chat)
    return packed


def known_architecture(checkpoint_dir: Path) -> str:
    """Return the name of a directory's architecture, after checking that loading it cannot run code.

    A model's own code is never run, and weights are never unpickled. Raises CheckpointError for a directory that needs
    either of them, and for an architecture that is not known.
    """
    config = read_json(checkpoint_dir / "config.json")
    names = config.get("architectures") or []
    architecture = names[0] if len(names) == 1 else f"{names}"
    if architecture != armorm.ARCHITECTURE and not architecture.endswith(ONE_SCORE):
        raise CheckpointError(
            f"{checkpoint_dir} has the architecture {architecture}, whose head is not known here. The known "
            f"architectures are …{ONE_SCORE} with one score (num_labels=1) and {armorm.ARCHITECTURE} (ArmoRM)."
        )
    files = [path for path in visible_files(checkpoint_dir) if path.suffix in (".py", *PICKLED)]
    code = [path.name for path in files if path.suffix == ".py"]
    if architecture != armorm.ARCHITECTURE and (code or "auto_map" in config):
        raise CheckpointError(
            f"{checkpoint_dir} brings its own code ({', '.join(code) or config['auto_map']}), which is never run here, "
            f"so its scores may differ from those of transformers' {architecture}. The only known architecture with "
            f"code of its own is {armorm.ARCHITECTURE}."
        )
    tokenizer = checkpoint_dir / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in read_json(tokenizer):
        raise CheckpointError(
            f"The tokenizer in {checkpoint_dir} brings its own code, which is never run here. "
            "Save it as a fast tokenizer of transformers."
        )
    pickled = [
        str(path.relative_to(checkpoint_dir))
        for path in files
        if path.suffix in PICKLED and not is_left_by_training(path)
    ]
    if pickled:
        raise CheckpointError(
            f"{checkpoint_dir} holds pickled files, which can run code when they are read: {', '.join(pickled)}. "
            "Save the model as safetensors (model.save_pretrained does that), and leave these files out."
        )
    require_own_weights(checkpoint_dir)
    return architecture


def is_left_by_training(path: Path) -> bool:
    """Return whether a file is one of LEFT_BY_TRAINING."""
    return any(path.match(pattern) for pattern in LEFT_BY_TRAINING)


def require_own_weights(checkpoint_dir: Path) -> None:
    """Check that every weight to load is in a visible safetensors file of the directory itself.

    Weights elsewhere are covered neither by the check for pickled files nor by the manifest's hash. Raises
    CheckpointError.
    """
    if (checkpoint_dir / "adapter_config.json").exists():  # transformers follows it to the base model that it names
        raise CheckpointError(
            f"{checkpoint_dir} holds an adapter (adapter_config.json), not a whole model. "
            "Merge it into its base, and save that."
        )
    files = visible_files(checkpoint_dir)
    weight_files = {path.relative_to(checkpoint_dir).as_posix() for path in files if path.suffix == ".safetensors"}
    for index in [path for path in files if path.name.endswith(".index.json")]:
        named = {str(name) for name in read_json(index).get("weight_map", {}).values()}
        # the loader refuses a file that is missing
        elsewhere = sorted(name for name in named - weight_files if (checkpoint_dir / name).is_file())
        if elsewhere:
            raise CheckpointError(
                f"{index} names weights that are not safetensors files of this directory: {', '.join(elsewhere)}. "
                "Put them into this directory."
            )


def visible_files(folder: Path) -> list[Path]:
    """Return every file below `folder`, without the hidden files and folders of tools (.git, .cache)."""
    paths = [
        path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return sorted(path for path in paths if path.is_file())
