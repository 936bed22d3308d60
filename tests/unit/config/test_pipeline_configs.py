"""Every config in pipelines/configs is valid, and the cluster's config asks only for what cluster.yaml's nodes have."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rm_robust.config.loading import load_config
from rm_robust.config.run import PipelineConfig, ReplicaConfig
from rm_robust.config.shared import WorkersConfig

REPOSITORY = Path(__file__).parents[3]
CONFIGS = sorted((REPOSITORY / "pipelines" / "configs").glob("*.toml"))
FULL_RLHF = REPOSITORY / "pipelines" / "configs" / "full_rlhf.toml"

Resources = dict[str, float]
"""The resources of one process or one node: CPU, GPU and custom names."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_named_after_its_file(path: Path) -> None:
    assert load_config(path, []).name == path.stem


def jobs_before(config: Path) -> list[list[str]]:
    """Return the commands in a config's comments, as a shell splits them."""
    commented = "".join(
        line.removeprefix("#") for line in config.read_text().splitlines(keepends=True) if line.startswith("#")
    )
    commands = re.findall(r"^ {8}(\S(?:.*\\\n)*.*)$", commented, re.MULTILINE)
    return [shlex.split(command.replace("\\\n", " ")) for command in commands]


def test_the_jobs_before_full_rlhf_make_what_it_reads_where_it_reads_it() -> None:
    config, (prompts, gold, backbone) = load_config(FULL_RLHF, []), jobs_before(FULL_RLHF)
    assert [command[:5] for command in (prompts, gold, backbone)] == [
        ["ray", "job", "submit", "--working-dir", "."]
    ] * 3
    entrypoints = [command[command.index("--") + 1 :] for command in (prompts, gold, backbone)]
    assert entrypoints[0][:2] == ["python", "-c"]
    assert f".to_json('{config.data.rloo_prompts[0]}')" in "".join(
        ast.unparse(ast.parse(entrypoints[0][2])).split("\n")
    )
    assert entrypoints[1][:2] == ["sh", "-c"]
    assert entrypoints[1][2].endswith(f" {config.serve.gold}")
    assert entrypoints[2][:4] == [
        "python",
        "pipelines/train_sft.py",
        "--config",
        str(FULL_RLHF.relative_to(REPOSITORY)),
    ]
    backbone_run = load_config(FULL_RLHF, entrypoints[2][5::2])
    assert config.reward_model.base_path == f"/shared/rm_robust/runs/{backbone_run.name}/checkpoints/sft"
    assert (backbone_run.name, backbone_run.model.path) == ("ultrachat_3b", "Qwen/Qwen2.5-3B")


def resources(num_cpus: float, num_gpus: float, custom: Resources) -> Resources:
    return {"CPU": num_cpus, "GPU": num_gpus, **custom}


def worker_bundles(workers: WorkersConfig) -> list[Resources]:
    return [
        resources(workers.num_cpus_per_worker, workers.num_gpus_per_worker, workers.resources_per_worker)
    ] * workers.num_workers


def replica_bundles(replica: ReplicaConfig) -> list[Resources]:
    return [resources(replica.num_cpus, replica.num_gpus, replica.resources)] * replica.num_replicas


def bundles_by_stage(config: PipelineConfig) -> dict[str, list[Resources]]:
    """Return what each stage holds at one time, with an entry for each process."""
    evaluation, rloo, serve = config.evaluation, config.rloo, config.serve
    engines = [resources(rloo.engine_num_cpus, rloo.engine_num_gpus, rloo.engine_resources)] * rloo.num_engines
    return {
        "sft": worker_bundles(config.sft.workers),
        "preferences": [resources(1, 0, config.data.task_resources)],
        "reward_model": worker_bundles(config.reward_model.workers),
        "evaluation": [resources(evaluation.num_cpus, evaluation.num_gpus, evaluation.resources)],
        "rloo": [
            *worker_bundles(rloo.trainers),
            *engines,
            *replica_bundles(serve.proxy_replica),
            *replica_bundles(serve.gold_replica),
        ],
    }


def unplaced_bundles(bundles: list[Resources], cluster: dict[str, Any]) -> list[Resources]:
    """Return the bundles that are left over when each goes to the first node with room.

    The cluster has grown to its `max_workers` of every kind.
    """
    nodes = [
        dict(kind["resources"]) for kind in cluster["available_node_types"].values() for _ in range(kind["max_workers"])
    ]
    unplaced = []
    for bundle in bundles:
        host = next(
            (node for node in nodes if all(node.get(name, 0) >= amount for name, amount in bundle.items())), None
        )
        if host is None:
            unplaced.append(bundle)
            continue
        for name, amount in bundle.items():
            if amount:
                host[name] -= amount
    return unplaced


def stages_that_do_not_fit(overrides: list[str]) -> list[str]:
    cluster = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    stages = bundles_by_stage(load_config(FULL_RLHF, overrides))
    return [stage for stage, bundles in stages.items() if unplaced_bundles(bundles, cluster)]


def test_every_stage_of_full_rlhf_fits_on_the_cluster() -> None:
    assert stages_that_do_not_fit([]) == []


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("reward_model.workers.num_workers=9", "reward_model"),  # two trainer nodes of four GPUs
        ("sft.workers.num_cpus_per_worker=13", "sft"),  # a node has 48 CPUs for four of them
        ("evaluation.resources={trainr=1}", "evaluation"),
        ("data.task_resources={dat=1}", "preferences"),
        ("rloo.engine_num_gpus=2", "rloo"),  # rollout nodes have one GPU
        ("rloo.num_engines=9", "rloo"),
        ("serve.gold_replica.num_replicas=3", "rloo"),  # with the proxy's two, on four serving nodes
    ],
)
def test_a_stage_that_asks_for_too_much_is_found(override: str, stage: str) -> None:
    assert stages_that_do_not_fit([override]) == [stage]


def test_every_gpu_of_full_rlhf_is_asked_for_on_a_kind_of_node() -> None:
    """A process without a custom resource lands on any node with a free GPU, and takes the place of another stage's."""
    for stage, bundles in bundles_by_stage(load_config(FULL_RLHF, [])).items():
        for bundle in bundles:
            assert bundle["GPU"] == sum(
                amount for name, amount in bundle.items() if name not in ("CPU", "GPU", "data")
            ), (stage, bundle)


def custom_resources_asked_for(paths: list[Path]) -> set[str]:
    bundles = [
        bundle for path in paths for stage in bundles_by_stage(load_config(path, [])).values() for bundle in stage
    ]
    return {name for bundle in bundles for name in bundle} - {"CPU", "GPU"}


def test_every_custom_resource_of_the_cluster_is_asked_for_by_a_config_and_no_other() -> None:
    kinds = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())["available_node_types"].values()
    offered = {name for kind in kinds for name in kind["resources"]} - {"CPU", "GPU"}
    assert custom_resources_asked_for(CONFIGS) == offered
    assert custom_resources_asked_for([path for path in CONFIGS if path != FULL_RLHF]) == set(), "made for any cluster"
