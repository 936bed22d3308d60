"""Check a run before any work: its settings against each other, its models, its files. No cluster and no weight.

Only what concerns the stages that are run is checked. Everything else of this kind would show hours later, in a worker.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig

from pipelines.stages import EVALUATION, PREFERENCES, REWARD_MODEL, RLOO, SFT, Stage
from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.preferences import check_preference_sources
from rm_robust.errors import ConfigError
from rm_robust.models.adopt import copy_files
from rm_robust.models.checkpoint import verify_checkpoint
from rm_robust.models.model_directory import check_language_model, unmatched_targets
from rm_robust.models.packing import num_positions
from rm_robust.rloo.proxy import check_proxy, policy_dir_now
from rm_robust.rloo.reward_functions import load_function
from rm_robust.runs import files as run_files
from rm_robust.runs.directory import Run
from rm_robust.runs.layout import RunLayout, is_hub_name
from rm_robust.runs.trackers import check_trackers
from rm_robust.scoring.find_checkpoint import find_reward_model

NEEDED = {
    PREFERENCES.name: ((SFT.name, "train-sft"),),
    REWARD_MODEL.name: ((SFT.name, "train-sft"), (PREFERENCES.name, "prepare-preferences")),
    EVALUATION.name: ((PREFERENCES.name, "prepare-preferences"), (REWARD_MODEL.name, "train-reward-model")),
    RLOO.name: (
        (SFT.name, "train-sft"),
        (PREFERENCES.name, "prepare-preferences"),
        (REWARD_MODEL.name, "train-reward-model"),
    ),
}
"""The stages whose results a stage reads, each with the command that runs it."""
GLOB = re.compile(r"[\[\]*?]")
"""Characters with which vLLM's search for weight files finds others, or none."""
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""What is taken of a model of the hub: no pickled weights, and none in other formats."""


def check_inputs(run: Run, stages: Sequence[Stage]) -> None:
    """Check the inputs of the stages before any work, and bring the models that are named as on the hub.

    Raises an RmRobustError for missing or empty files, for models that cannot be trained or would make scores wrong,
    for lengths that a model does not take, and where RLOO would have no prompts or no reward.
    """
    config = run.config
    check_trackers(config.tracking)
    check_earlier_stages(run, stages)
    if RLOO in stages:
        check_rloo(config)
    check_preference_sources(config, run.run_dir)
    folders = find_models(run)
    if RLOO in stages and config.rloo.proxy is not None:
        check_proxy(config, run.run_dir, policy_dir=policy_dir_now(config, run.run_dir, folders))
    policy = policy_of(config, stages, folders)
    base = base_of(config, policy, folders)
    check_adapters(config, base)
    check_lengths(config, stages, policy, base)
    bring_models(run, folders)


def check_earlier_stages(run: Run, stages: Sequence[Stage]) -> None:
    """Raise ConfigError for a stage that needs the result of another one, which is neither done nor run before it."""
    layout = RunLayout(run.run_dir)
    for stage in stages:
        for needed, command in NEEDED.get(stage.name, ()):
            if needed == SFT.name:
                has_own_start = stage is not RLOO and run.config.reward_model.base_path is not None
                is_read = run.config.sft.enabled and not has_own_start
            else:
                is_read = stage is not RLOO or run.config.rloo.proxy is None
            if is_read and needed not in [other.name for other in stages] and not layout.is_done(needed):
                raise ConfigError(
                    f"Stage {stage.name} needs the result of stage {needed}, and {run_files.shown(run.run_dir)} has "
                    f"none. Run `rm-robust {command}` with the same config first."
                )


def refuse_glob_characters(path: Path | str, given_as: str) -> None:
    """Raise ConfigError for a path in which vLLM would find no weights."""
    if GLOB.search(str(path)):
        raise ConfigError(
            f"{given_as} = {path} has one of the characters [ ] * ?, which vLLM takes for a pattern when it looks for "
            "weights. Name a path without them."
        )


def check_rloo(config: PipelineConfig) -> None:
    """Raise an RmRobustError for what only RLOO reads: prompts, the judge, the served lengths and reward functions."""
    if config.data.source != "embedded" and not config.data.rloo_prompts:
        raise ConfigError(
            "data.rloo_prompts is empty; name the prompts that RLOO samples from, or run the stages up to the "
            "reward model with `rm-robust run-reward-model`."
        )
    check_served_lengths(config)
    for source in config.rloo.reward_sources:
        if source.function is not None:
            load_function(source)
    if config.serve.gold != "embedded" and config.serve.gold_url is None:
        verify_checkpoint(run_files.locate(config.serve.gold), "reward_model")


def check_served_lengths(config: PipelineConfig) -> None:
    """Raise ConfigError where RLOO could sample completions that its scorers refuse as too long."""
    longest = config.data.max_prompt_tokens + config.rloo.max_new_tokens + 1
    replicas = {"proxy_replica": config.serve.proxy_replica} if config.rloo.proxy_url is None else {}
    if config.serve.gold_url is None:
        replicas["gold_replica"] = config.serve.gold_replica
    for name, replica in replicas.items():
        if longest > replica.max_length_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens + rloo.max_new_tokens + 1 = {longest} exceeds serve.{name}.max_length_tokens "
                f"= {replica.max_length_tokens}: RLOO could sample completions that the scorer refuses. Set it to at "
                f"least {longest}."
            )


def find_models(run: Run) -> dict[str, Path]:
    """Return the directory of each model that the config names, by its name; a model of the hub is downloaded first.

    Raises ConfigError for a name that is neither a directory nor a model that the hub or its cache here has.
    """
    settings = {"model.path": run.config.model.path, "reward_model.base_path": run.config.reward_model.base_path}
    folders: dict[str, Path] = {}
    for setting, name in settings.items():
        if name is None or name in folders:
            continue
        folder = Path(RunLayout(run.run_dir).model_dir(name))
        if is_hub_name(name) and not (run_files.fetch(folder) / "config.json").is_file():
            folder = from_hub(name, setting)
        if not folder.is_dir():
            raise ConfigError(f"{setting} = {name}: there is no such directory. Correct the path.")
        folders[name] = folder
    return folders


def bring_models(run: Run, folders: dict[str, Path]) -> None:
    """Copy the hub's models into the run, once, so that every stage and node gets the same files."""
    for name, folder in folders.items():
        target = Path(RunLayout(run.run_dir).model_dir(name))
        if folder != target:
            run_files.commit(target, partial(copy_model, folder))


def from_hub(name: str, setting: str) -> Path:
    """Return the folder of a hub's model in the cache of this machine, after downloading what is missing.

    Raises ConfigError when the hub cannot be reached, or has no such model.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES)))
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(
            f"{setting} = {name} is no directory here, and cannot be fetched from the Hugging Face hub ({reason}). "
            "Correct the path or the name, or download the model where the hub can be reached and name its directory."
        ) from error


def copy_model(source: Path, folder: Path) -> None:
    """Put the files of a model into a folder, as hard links where the file system allows them."""
    copy_files(sorted(path for path in source.rglob("*") if path.is_file()), source, folder)


@dataclass(frozen=True)
class StartModel:
    """The policy before its training, or what the reward model starts from."""

    label: str
    """The setting that names it, with its value."""
    config: PreTrainedConfig
    positions: int | None
    """Longest text that it takes, in tokens; None: without bound."""


def policy_of(config: PipelineConfig, stages: Sequence[Stage], folders: dict[str, Path]) -> StartModel:
    """Check the policy's start, and return it. Raises CheckpointError, ChatTemplateError or ConfigError."""
    path = config.model.path
    if path is None:
        from_scratch = AutoConfig.for_model("qwen2", num_hidden_layers=1)
        return StartModel("model.max_position_embeddings", from_scratch, config.model.max_position_embeddings)
    if RLOO in stages and not config.sft.enabled:
        refuse_glob_characters(path, "model.path")
    label = f"model.path = {path}"
    is_policy = config.sft.enabled or RLOO in stages
    checked = check_language_model(folders[path], label, load_chat=ChatFormat.load, is_policy=is_policy)
    return StartModel(label, checked, num_positions(checked))


def base_of(config: PipelineConfig, policy: StartModel, folders: dict[str, Path]) -> StartModel:
    """Check what the reward model starts from, and return it. Raises CheckpointError or ChatTemplateError."""
    base = config.reward_model.base_path
    if base is None:
        return policy
    label = f"reward_model.base_path = {base}"
    checked = check_language_model(folders[base], label, load_chat=ChatFormat.load, is_policy=False)
    return StartModel(label, checked, num_positions(checked))


def check_adapters(config: PipelineConfig, base: StartModel) -> None:
    """Raise ConfigError for a name of adapted layers that no layer of the model has."""
    lora = config.reward_model.lora
    if lora is None or isinstance(lora.target_modules, str):
        return
    unmatched, known = unmatched_targets(base.config, lora.target_modules)
    if unmatched or not lora.target_modules:
        raise ConfigError(
            f"reward_model.lora.target_modules: {', '.join(unmatched) or 'the empty list'} names no linear layer of "
            f'{base.label}. It has {", ".join(known)}; "all-linear" takes all of them.'
        )


def check_lengths(config: PipelineConfig, stages: Sequence[Stage], policy: StartModel, base: StartModel) -> None:
    """Raise ConfigError where a stage would give a model more tokens than it has positions."""
    data = config.data
    needs: list[tuple[str, int, str, int | None]] = []
    trained = data.max_prompt_tokens + data.max_completion_tokens
    users = [(SFT, policy)] * config.sft.enabled + [(REWARD_MODEL, base), (EVALUATION, base)]
    needs += [
        ("data.max_prompt_tokens + data.max_completion_tokens", trained, model.label, model.positions)
        for stage, model in users
        if stage in stages
    ]
    if RLOO in stages:
        sampled = data.max_prompt_tokens + config.rloo.max_new_tokens
        needs.append(("data.max_prompt_tokens + rloo.max_new_tokens", sampled, policy.label, policy.positions))
        needs += served_lengths(config, base)
    for setting, length, label, positions in needs:
        if positions is not None and length > positions:
            raise ConfigError(
                f"{setting} = {length} exceeds the {positions} positions of {label}. Lower it to at most {positions}, "
                "or name a model that takes longer texts."
            )


def served_lengths(config: PipelineConfig, base: StartModel) -> list[tuple[str, int, str, int | None]]:
    """Return the setting and the length that each of RLOO's own scorers is served with, and its label and positions."""
    serve, proxy = config.serve, config.rloo.proxy
    models: list[tuple[str, int, str, int | None]] = []
    replica = serve.proxy_replica.max_length_tokens
    if proxy is None:
        models.append(("serve.proxy_replica.max_length_tokens", replica, base.label, base.positions))
    elif config.rloo.proxy_url is None:
        found = num_positions(AutoConfig.from_pretrained(str(find_reward_model(proxy))))
        models.append(("serve.proxy_replica.max_length_tokens", replica, f"rloo.proxy = {proxy}", found))
    if serve.gold != "embedded" and serve.gold_url is None:
        found = num_positions(AutoConfig.from_pretrained(str(run_files.locate(serve.gold))))
        replica = serve.gold_replica.max_length_tokens
        models.append(("serve.gold_replica.max_length_tokens", replica, f"serve.gold = {serve.gold}", found))
    return models
