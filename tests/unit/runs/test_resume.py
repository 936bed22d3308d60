"""A run that goes on: which settings may change, which stages go on, and what is done again."""

import json
from pathlib import Path

import pytest

from rm_robust.config.changes import changes_between
from rm_robust.config.loading import load_config
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import OnResume, OptimizerConfig
from rm_robust.errors import ConfigError
from rm_robust.runs.directory import check_run_dir, claim_run_dir
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import planned_steps
from rm_robust.runs.resume import delete_states_of_done, has_state
from rm_robust.training.engines.engine import learning_rate_at

SMOKE = Path("pipelines/configs/smoke.toml")


def config(*overrides: str) -> PipelineConfig:
    return load_config(SMOKE, ["rloo.num_steps=4", *overrides])


def begun(run_dir: Path, *done: str, states: tuple[str, ...] = ("rloo",), of: PipelineConfig | None = None) -> Path:
    """Make a run directory whose stages `done` are done, with training states of `states`."""
    claim_run_dir(run_dir, of or config())
    layout = RunLayout(run_dir)
    for stage in states:
        (layout.training_state(stage) / "step-0000004").mkdir(parents=True)
    for stage in done:
        layout.run_stage(stage, dict)
    return run_dir


@pytest.mark.parametrize(
    "override",
    [
        "rloo.num_engines=2",
        "rloo.trainers.num_workers=2",
        "reward_model.workers.num_workers=1",
        "sft.workers.num_cpus_per_worker=0.25",
        "serve.proxy_replica.num_cpus=0.125",
        'tracking.mlflow_experiment="mine"',
        "rloo.checkpoint_every_steps=3",
    ],
)
def test_where_a_run_computes_may_change(tmp_path: Path, override: str, caplog: pytest.LogCaptureFixture) -> None:
    claim_run_dir(begun(tmp_path, "sft", "rloo"), config(override))
    name, _, value = override.partition("=")
    assert f"setting changed since this run began: {name}: " in caplog.text
    assert f", {value.replace(chr(34), chr(39))} now" in caplog.text
    assert RunLayout(tmp_path).is_done("rloo")
    assert check_run_dir(tmp_path, config(override))
    caplog.clear()
    claim_run_dir(tmp_path, config(override))
    assert not caplog.text


@pytest.mark.parametrize(
    "override", ["seed=5", "rloo.kl_coefficient=0.5", "sft.optimizer.learning_rate=0.1", "model.num_layers=3"]
)
def test_what_decides_results_may_not_change(tmp_path: Path, override: str) -> None:
    begun(tmp_path, "sft")
    with pytest.raises(ConfigError, match=f"another config:\n  {override.partition('=')[0]}: "):
        claim_run_dir(tmp_path, config(override, "rloo.num_engines=2"))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (['rloo.strategy.kind="deepspeed"'], "DeepSpeed"),
        (["rloo.num_minibatches_per_epoch=2"], "minibatches"),
    ],
)
def test_the_number_of_workers_decides_results_where_they_depend_on_it(
    tmp_path: Path, overrides: list[str], reason: str
) -> None:
    begun(tmp_path, "rloo", of=config(*overrides))
    with pytest.raises(ConfigError, match=f"rloo.trainers.num_workers: 1 there, 2 now .*{reason}"):
        claim_run_dir(tmp_path, config(*overrides, "rloo.trainers.num_workers=2"))


def test_a_setting_without_a_declaration_decides_results() -> None:
    mine = config()
    now = json.loads(mine.model_dump_json())
    (change,) = changes_between({**now, "of_tomorrow": 1}, now, mine)
    assert (change.name, change.on_resume) == ("of_tomorrow", OnResume.DECIDES_RESULTS)


def test_a_done_stage_that_gets_more_steps_goes_on_from_its_state(tmp_path: Path) -> None:
    layout = RunLayout(begun(tmp_path, "sft", "evaluation", "rloo"))
    claim_run_dir(tmp_path, config("rloo.num_steps=8"))
    assert [layout.is_done(stage) for stage in ("sft", "evaluation", "rloo")] == [True, True, False]
    assert has_state(layout, "rloo")
    assert json.loads((tmp_path / "config.resolved.json").read_text())["rloo"]["num_steps"] == 8


def test_fewer_steps_are_refused_with_the_reason(tmp_path: Path) -> None:
    begun(tmp_path, "rloo")
    with pytest.raises(ConfigError, match=r"rloo.num_steps \(4 there, 3 now\): it may grow, and not shrink"):
        check_run_dir(tmp_path, config("rloo.num_steps=3"))


def test_a_stage_whose_state_is_gone_cannot_grow_and_the_message_names_the_way(tmp_path: Path) -> None:
    begun(tmp_path, "rloo", states=())
    with pytest.raises(ConfigError, match="the training state of rloo is gone. Add --again rloo"):
        check_run_dir(tmp_path, config("rloo.num_steps=8"))
    claim_run_dir(tmp_path, config("rloo.num_steps=8"), ["rloo"])
    assert not RunLayout(tmp_path).is_done("rloo")


def test_a_schedule_that_falls_to_zero_cannot_grow(tmp_path: Path) -> None:
    cosine = 'rloo.optimizer.schedule="cosine"'
    begun(tmp_path, "rloo", of=config(cosine))
    with pytest.raises(ConfigError, match="rloo.optimizer.schedule falls to zero"):
        check_run_dir(tmp_path, config(cosine, "rloo.num_steps=8"))


def test_a_reward_model_grows_before_a_policy_is_trained_on_it_and_is_evaluated_again(tmp_path: Path) -> None:
    constant = 'reward_model.optimizer.schedule="constant"'
    longer = config(constant, "reward_model.num_epochs=9")
    layout = RunLayout(begun(tmp_path, "reward_model", "evaluation", states=("reward_model",), of=config(constant)))
    claim_run_dir(tmp_path, longer)
    assert [layout.is_done(stage) for stage in ("reward_model", "evaluation")] == [False, False]


def test_a_reward_model_that_a_policy_was_trained_on_grows_only_with_the_policy_trained_anew(tmp_path: Path) -> None:
    constant = 'reward_model.optimizer.schedule="constant"'
    longer = config(constant, "reward_model.num_epochs=9")
    begun(tmp_path, "reward_model", "rloo", states=("reward_model", "rloo"), of=config(constant))
    with pytest.raises(ConfigError, match="rloo has begun with its result. Add --again rloo"):
        check_run_dir(tmp_path, longer)
    claim_run_dir(tmp_path, longer, ["rloo"])
    assert not RunLayout(tmp_path).is_done("rloo")
    assert [has_state(RunLayout(tmp_path), stage) for stage in ("reward_model", "rloo")] == [True, False]


def test_the_warm_up_of_a_stage_that_gets_more_steps_stays_as_planned(tmp_path: Path) -> None:
    lines = [{"stage": "rloo", "step": step, "num_steps": 10} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    planned = planned_steps(tmp_path, "rloo", first_step=2, num_steps=100)
    assert planned == 10
    assert planned_steps(tmp_path, "rloo", first_step=0, num_steps=100) == 100
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_fraction=0.2, schedule="constant")
    assert [learning_rate_at(step, planned, optimizer) for step in (0, 1, 2, 50)] == [0.05, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("content", [None, b"", b"\0" * 300, b"[]"])
def test_a_lost_config_is_taken_from_its_copy(tmp_path: Path, content: bytes | None) -> None:
    path = begun(tmp_path, "sft") / "config.resolved.json"
    before = path.read_text()
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match="another config:\n  seed"):
        claim_run_dir(tmp_path, config("seed=5"))
    claim_run_dir(tmp_path, config())
    assert path.read_text() == before


def test_a_run_without_any_config_is_claimed_by_nobody(tmp_path: Path) -> None:
    begun(tmp_path, "sft")
    for name in ("config.resolved.json", ".config.resolved.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="config.resolved.json is missing or damaged, so nobody knows"):
        claim_run_dir(tmp_path, config())


@pytest.mark.parametrize("damage", ["missing", "shorter", "zeroed"])
def test_a_stage_with_a_damaged_file_is_not_done(tmp_path: Path, damage: str) -> None:
    layout = RunLayout(tmp_path)
    layout.run_stage("evaluation", lambda: {"n": layout.evaluation_table.write_text('{"a": 1}')})
    assert layout.is_done("evaluation")
    if damage == "missing":
        layout.evaluation_table.unlink()
    else:
        layout.evaluation_table.write_bytes(b"{}" if damage == "shorter" else bytes(8))
    assert not layout.is_done("evaluation")
    assert layout.damaged_file("evaluation") == layout.evaluation_table


def test_states_of_done_stages_go_unless_they_may_grow_or_are_kept(tmp_path: Path) -> None:
    layout = RunLayout(begun(tmp_path, states=("sft", "rloo")))
    keeps = config('sft.optimizer.schedule="cosine"', 'kept_states="all"')
    delete_states_of_done(layout, keeps, "sft")
    assert has_state(layout, "sft")
    for stage in ("sft", "rloo", "evaluation"):
        delete_states_of_done(layout, config('sft.optimizer.schedule="cosine"'), stage)
    assert [has_state(layout, stage) for stage in ("sft", "rloo")] == [False, True]
