"""Which stages of a run the cluster will be asked for."""

from pathlib import Path

from rm_robust.config_loading import Run, load_config
from rm_robust.stages import ALL_STAGES, REWARD_MODEL_STAGES, stages_ahead

SMOKE = Path("pipelines/configs/smoke.toml")


def commit(run_dir: Path, *stages: str) -> None:
    (run_dir / "stages").mkdir(parents=True, exist_ok=True)
    for stage in stages:
        (run_dir / "stages" / f"{stage}.json").write_text("{}")


def test_what_is_not_committed_is_ahead(tmp_path: Path) -> None:
    run = Run(load_config(SMOKE, []), tmp_path)
    assert stages_ahead(run, ALL_STAGES) == ["sft", "preferences", "reward_model", "evaluation", "rloo"]
    commit(tmp_path, "world", "sft", "preferences")
    assert stages_ahead(run, ALL_STAGES) == ["reward_model", "evaluation", "rloo"]
    assert stages_ahead(run, REWARD_MODEL_STAGES) == ["reward_model", "evaluation"]


def test_the_bradley_terry_twin_asks_for_what_the_reward_model_does(tmp_path: Path) -> None:
    run = Run(load_config(SMOKE, ["reward_model.bt_twin=true"]), tmp_path)
    commit(tmp_path, "world", "sft", "preferences", "reward_model", "evaluation", "rloo")
    assert stages_ahead(run, ALL_STAGES) == ["reward_model", "evaluation"]
    commit(tmp_path / "bt_twin", "reward_model")
    assert stages_ahead(run, ALL_STAGES) == ["evaluation"]
    commit(tmp_path / "bt_twin", "evaluation")
    assert stages_ahead(run, ALL_STAGES) == []
