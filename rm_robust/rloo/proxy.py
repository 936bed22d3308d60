"""Train against a reward model that exists already (rloo.proxy): find it, check it, and keep to it when a run resumes.

Nothing here needs a cluster, so a run that cannot work ends before it starts.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.errors import ChatTemplateError, CheckpointError, ConfigError, ScoringError
from rm_robust.models.checkpoint import verify_checkpoint
from rm_robust.models.export import ending_at_the_score
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import ScoreInput
from rm_robust.scoring.find_checkpoint import find_reward_model

NUM_RETRIES = 4
"""Further attempts to reach a served proxy before a run starts; they wait about 2 s in total."""
PROBE = ScoreInput(prompt="Name a colour.", completions=["Blue."])
"""The input whose reply says which model a service scores with."""


@dataclass(frozen=True)
class ProxyIdentity:
    """Which reward model a run trains against. It is kept in rloo/proxy.json."""

    proxy: str
    """rloo.proxy of the config."""
    checkpoint: str
    """The hash of the model's files, "sha256:…"; for a service, what its reply says."""
    template: str | None
    """The hash of its chat template; None where a service does not say."""


def check_proxy(config: PipelineConfig, run_dir: Path, *, policy_dir: Path | None) -> ProxyIdentity:
    """Return the identity of rloo.proxy after checking it. `policy_dir` has the policy's tokenizer, if it exists yet.

    Raises CheckpointError when there is no reward model there or its files have changed since its commit, ConfigError
    when the service does not answer, and when the run has trained against another model before, and ChatTemplateError
    when its chat template is not the policy's and rloo.proxy_template does not allow that.
    """
    assert config.rloo.proxy is not None, "the run trains its own reward model"
    identity = identity_of(config.rloo.proxy, url=config.rloo.proxy_url, timeout_s=config.serve.request_timeout_s)
    path = RunLayout(run_dir).rloo_proxy
    if path.exists():
        earlier = ProxyIdentity(**json.loads(path.read_text()))
        if earlier.checkpoint != identity.checkpoint:
            raise ConfigError(
                f"rloo.proxy = {identity.proxy} is now {identity.checkpoint}, and this run has trained against "
                f"{earlier.checkpoint}: rewards of two models cannot be compared. Put that model back, or begin a new "
                "run with another --run-dir."
            )
    if policy_dir is not None and config.rloo.proxy_template == "same":
        refuse_other_template(identity, policy_dir)
    return identity


def record_proxy(run_dir: Path, identity: ProxyIdentity) -> None:
    """Keep the identity, so that a resumed run is refused another model."""
    path = RunLayout(run_dir).rloo_proxy
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        run_files.write_json(path, asdict(identity))


def identity_of(proxy: str, *, url: str | None, timeout_s: float) -> ProxyIdentity:
    """Return what a checkpoint's manifest, or a service's reply, says about the reward model."""
    if url is None:
        manifest = verify_checkpoint(find_reward_model(proxy), "reward_model")
        return ProxyIdentity(proxy, manifest.content_sha256, manifest.template_sha256)
    run_files.refuse_password(url)
    try:
        with RewardClient(url, timeout_s=timeout_s, max_retries=NUM_RETRIES) as client:
            reply = client.score([PROBE])
    except ScoringError as error:
        raise ConfigError(
            f"rloo.proxy = {url} does not score: {error}. Start the service, or correct the address or the key in "
            "RM_ROBUST_API_KEY."
        ) from error
    return ProxyIdentity(proxy, reply.checkpoint, reply.template)


def refuse_other_template(identity: ProxyIdentity, policy_dir: Path) -> None:
    """Raise ChatTemplateError when the proxy's chat template is not that of the policy in `policy_dir`."""
    ours = templates_of(policy_dir)
    if identity.template is not None and identity.template not in ours:
        raise ChatTemplateError(
            f"rloo.proxy = {identity.proxy} has the chat template {identity.template}, and the policy in {policy_dir} "
            f'has {ours[0]}. Name a reward model of the policy\'s family, or set rloo.proxy_template = "own": the '
            "proxy then gets the texts, and applies its own template."
        )


def templates_of(policy_dir: Path) -> tuple[str, str]:
    """Return the hashes of the policy's chat template, and of the one with which its reward models are saved.

    The saved one ends with the end of turn. Prompts and completions have the same ids with both.
    """
    chat = ChatFormat.load(policy_dir)
    return chat.template_sha256, ending_at_the_score(chat).template_sha256


def policy_dir_now(config: PipelineConfig, run_dir: Path, folders: dict[str, Path]) -> Path | None:
    """Return the directory that has the policy's tokenizer already; None before SFT has made a model from scratch.

    `folders` has the directory of each model that the config names.
    """
    layout = RunLayout(run_dir)
    if config.model.path is not None:
        return folders[config.model.path]
    return layout.sft_checkpoint if run_files.is_reachable(layout.sft_checkpoint) else None


def require_policy(config: PipelineConfig, run_dir: Path) -> Path:
    """Return the directory of the policy before RLOO. Raises CheckpointError with the command that makes it."""
    folder = Path(RunLayout(run_dir).sft_model_dir(config))
    if not run_files.is_reachable(folder):
        raise CheckpointError(
            f"There is no policy at {run_files.shown(folder)} to begin with: run `rm-robust train-sft`, or set "
            "model.path and sft.enabled = false."
        )
    return folder
