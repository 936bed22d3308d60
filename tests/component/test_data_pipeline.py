"""Check that Ray Data reads, tokenises and writes every row, or counts it as dropped, for all kinds of files."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from rm_robust.cluster import capacity
from rm_robust.config.data import Overlong
from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.demonstrations import prepare_sft
from rm_robust.data.pipeline import DataSource, TokeniseReport, tokenise_sources
from rm_robust.data.rows import RowKind
from rm_robust.data.token_files import read_token_groups
from rm_robust.data.token_rows import TokenLimits
from rm_robust.errors import DataError
from rm_robust.runs.layout import RunLayout
from tests.support.s3_server import CREDENTIALS, s3_server
from tests.support.tiny_models import tiny_tokenizer

NUM_ROWS = 300
LIMITS = TokenLimits(max_prompt_tokens=60, max_completion_tokens=40, max_dropped_fraction=0.05)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    credentials = {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything"}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level="warning",
        runtime_env={"env_vars": credentials},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def pair(number: int) -> dict[str, str]:
    """Return a pair whose completion holds U+2028, which does not end a jsonl line."""
    return {
        "pair_id": f"{number:04}",
        "prompt": f"red {number}",
        "chosen": f"green\u2028{number}",
        "rejected": f"seven {number}",
    }


def lines(numbers: range) -> list[str]:
    return [json.dumps(pair(number), ensure_ascii=False) for number in numbers]


def tokenise(folder: Path, chat_dir: Path, *paths: Path | str, scenario: str = "train") -> TokeniseReport:
    source = DataSource(scenario, tuple(str(path) for path in paths), RowKind.PAIR)
    return tokenise_sources([source], chat_dir=chat_dir, out_dir=folder / "tokens", limits=LIMITS)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_every_row_of_jsonl_and_parquet_is_kept_with_the_ids_of_chat_or_counted_by_reason(
    tmp_path: Path, chat_dir: Path, scheme: str
) -> None:
    bad = [
        "",
        '{"prompt": "torn',
        json.dumps({**pair(1), "rejected": "green\u20281"}),
        json.dumps({**pair(1), "prompt": "red " * 90}),
        '{"prompt": "x"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines(range(200)) + bad), encoding="utf-8")
    (tmp_path / "deep").mkdir()
    pq.write_table(
        pa.Table.from_pylist([pair(number) for number in range(200, NUM_ROWS)]), tmp_path / "deep" / "b.parquet"
    )
    report = tokenise(tmp_path, chat_dir, f"{scheme}{tmp_path}")
    assert (report.num_read, report.num_kept) == ({"train": NUM_ROWS + 4}, {"train": NUM_ROWS})
    assert report.num_dropped == {"train": {"malformed": 2, "identical completions": 1, "prompt too long": 1}}
    assert len(report.examples) == 4
    assert json.loads((tmp_path / "tokens" / "report.json").read_text())["num_kept"] == report.num_kept
    chat = ChatFormat.load(chat_dir)
    groups = read_token_groups(tmp_path / "tokens" / "scenario=train")
    assert [group.group_id for group in groups] == [f"{number:04}" for number in range(NUM_ROWS)]
    for number in (0, 199, 200, 299):
        assert groups[number].tokens.prompt_ids == chat.prompt_ids(f"red {number}")
        assert groups[number].tokens.completion_ids == [
            chat.completion_ids(f"green\u2028{number}"),
            chat.completion_ids(f"seven {number}"),
        ]


def test_a_bucket_is_read_by_rays_workers(tmp_path: Path, chat_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// is read over its protocol from moto's server."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    pq.write_table(pa.Table.from_pylist([pair(number) for number in range(20, 30)]), tmp_path / "b.parquet")
    objects = {
        "mine/a.jsonl": "\n".join(lines(range(20))).encode(),
        "mine/b.parquet": (tmp_path / "b.parquet").read_bytes(),
    }
    with s3_server() as server:
        server.put("rows", objects)
        report = tokenise(tmp_path, chat_dir, f"s3://rows/mine?{server.options}")
    assert (report.num_kept, report.num_dropped) == ({"train": 30}, {"train": {}})
    assert [group.group_id for group in read_token_groups(tmp_path / "tokens" / "scenario=train")] == [
        f"{number:04}" for number in range(30)
    ]


def test_a_hub_data_set_is_read_whole(tmp_path: Path, chat_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` loads a folder as it loads a downloaded data set, so the test needs no hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine" / "data").mkdir(parents=True)
    rows = [pair(number) for number in range(1500)]  # more than a block
    pq.write_table(pa.Table.from_pylist(rows[:20]), tmp_path / "mine" / "data" / "validation-0.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine" / "data" / "train-0.parquet")
    for split, num_rows in (("", 1500), (":validation", 20)):
        report = tokenise(tmp_path, chat_dir, f"hub:{tmp_path}/mine{split}", scenario=f"train{num_rows}")
        assert (report.num_kept, report.num_dropped) == ({f"train{num_rows}": num_rows}, {f"train{num_rows}": {}})
        groups = read_token_groups(tmp_path / "tokens" / f"scenario=train{num_rows}")
        assert [group.group_id for group in groups] == [f"{number:04}" for number in range(num_rows)]


def test_several_scenarios_are_written_and_counted_apart(tmp_path: Path, chat_dir: Path) -> None:
    sources = []
    for scenario, numbers in (("train", range(7)), ("in_domain", range(7, 10))):
        (tmp_path / f"{scenario}.jsonl").write_text("\n".join(lines(numbers)), encoding="utf-8")
        sources.append(DataSource(scenario, (str(tmp_path / f"{scenario}.jsonl"),), None))
    report = tokenise_sources(sources, chat_dir=chat_dir, out_dir=tmp_path / "tokens", limits=LIMITS)
    assert report.num_kept == {"train": 7, "in_domain": 3}
    assert [group.group_id for group in read_token_groups(tmp_path / "tokens" / "scenario=in_domain")] == [
        "0007",
        "0008",
        "0009",
    ]
    assert not list((tmp_path / "tokens").rglob("rows"))


def test_weighted_sources_and_rankings_are_counted_apart_and_weigh_what_they_should(
    tmp_path: Path, chat_dir: Path
) -> None:
    """One scenario has two sources: pairs, one of them cut; and two rankings of three completions, one with a tie."""
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join([*lines(range(5)), json.dumps({**pair(5), "prompt": "red " * 90})]), encoding="utf-8"
    )
    rankings = [
        {"prompt_id": f"r{i}", "prompt": f"blue {i}", "completions": ["red", "green", "seven"], "gold_scores": scores}
        for i, scores in enumerate(([1.0, 2.0, 3.0], [1.0, 2.0, 2.0]))
    ]
    pq.write_table(pa.Table.from_pylist(rankings), tmp_path / "rankings.parquet")
    sources = [
        DataSource("train", (str(tmp_path / "pairs.jsonl"),), RowKind.TRAINING_PAIRS),
        DataSource("train", (f"file://{tmp_path}/rankings.parquet",), RowKind.TRAINING_PAIRS, weight=3.0),
        DataSource("in_domain", (f"file://{tmp_path}/rankings.parquet",), None),
    ]
    limits = TokenLimits(60, 40, 0.05, Overlong.TRUNCATE_PROMPT_LEFT)
    report = tokenise_sources(sources, chat_dir=chat_dir, out_dir=tmp_path / "tokens", limits=limits)
    assert [(s.weight, s.num_read, s.num_kept, s.num_truncated, s.num_dropped) for s in report.sources] == [
        (1.0, 6, 6, 1, {}),
        (3.0, 2, 5, 0, {"tied scores": 1}),
        (1.0, 2, 2, 0, {}),
    ]
    assert (report.num_read["train"], report.num_kept["train"], report.num_truncated["train"]) == (8, 11, 1)
    assert report.num_dropped == {"train": {"tied scores": 1}, "in_domain": {}}
    assert sorted(example["reason"].partition(":")[0] for example in report.examples) == [
        "prompt truncated",
        "tied scores",
    ]
    groups = read_token_groups(tmp_path / "tokens" / "scenario=train")
    weights = {group.group_id: group.weight for group in groups}
    assert all(weights[f"{number:04}"] == 1.0 for number in range(6))
    assert sum(weight for group_id, weight in weights.items() if group_id.startswith("r0")) == pytest.approx(3.0)
    assert {group_id: weight for group_id, weight in weights.items() if group_id.startswith("r1")} == {
        "r1:1>0": 1.5,
        "r1:2>0": 1.5,
    }
    assert max(len(group.tokens.prompt_ids) for group in groups) == 60
    assert [len(group.gold_scores) for group in read_token_groups(tmp_path / "tokens" / "scenario=in_domain")] == [3, 3]


def test_a_bad_source_is_not_hidden_by_a_large_good_one(tmp_path: Path, chat_dir: Path) -> None:
    (tmp_path / "good.jsonl").write_text("\n".join(lines(range(100))), encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines(range(100, 103)), "{torn"]), encoding="utf-8")
    sources = [
        DataSource("train", (str(tmp_path / name),), RowKind.TRAINING_PAIRS) for name in ("good.jsonl", "bad.jsonl")
    ]
    with pytest.raises(DataError, match=r"1 of 4 rows of 'train' \(.*bad.jsonl\) are malformed"):
        tokenise_sources(sources, chat_dir=chat_dir, out_dir=tmp_path / "tokens", limits=LIMITS)


def test_too_many_malformed_rows_fail_with_the_first_of_them_and_commit_nothing(tmp_path: Path, chat_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([*lines(range(10)), "{torn"]), encoding="utf-8")
    with pytest.raises(
        DataError,
        match=r"1 of 11 rows of 'train' \(.*a.jsonl\) are malformed, more than data.max_dropped_fraction = 0.05. "
        r"First: .*in '{torn'",
    ):
        tokenise(tmp_path, chat_dir, tmp_path / "a.jsonl")
    assert not (tmp_path / "tokens").exists()


def test_a_source_of_which_nothing_is_left_fails_with_the_reasons(tmp_path: Path, chat_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**pair(1), "prompt": "red " * 90}))
    with pytest.raises(
        DataError, match=r"None of the 1 rows of 'train' \(.*a.jsonl\) is kept \(dropped: {'prompt too long': 1}\)"
    ):
        tokenise(tmp_path, chat_dir, tmp_path / "a.jsonl")


def test_sft_is_prepared_from_the_users_demonstrations_alone(tmp_path: Path) -> None:
    """The tokenizer and the base model come from their text, and their tokens from that tokenizer.

    One of 31 rows is malformed, which the limit allows.
    """
    rows = [
        json.dumps({"id": f"{i:02}", "prompt": f"red {i}", "completion": f"green\u2028{i}"}, ensure_ascii=False)
        for i in range(30)
    ]
    (tmp_path / "sft.jsonl").write_text("\n".join([*rows, '{"prompt": "x"}']), encoding="utf-8")
    data = {
        "source": "scenarios",
        "train": ["t"],
        "in_domain": ["i"],
        "rloo_prompts": ["p"],
        "sft": [str(tmp_path / "sft.jsonl")],
    }
    model = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "vocab_size": 300,
    }
    config = PipelineConfig.model_validate({"name": "test", "data": data, "serve": {"gold": "judge"}, "model": model})
    report = prepare_sft(config, tmp_path / "run", LIMITS)
    assert (report["sft"]["num_kept"], report["sft"]["num_dropped"]) == ({"sft": 30}, {"sft": {"malformed": 1}})
    layout = RunLayout(tmp_path / "run")
    chat = ChatFormat.load(layout.base_model)
    groups = read_token_groups(layout.sft_tokens / "scenario=sft")
    assert [group.tokens.completion_ids for group in groups] == [
        [chat.completion_ids(f"green\u2028{i}")] for i in range(30)
    ]


def test_a_wait_for_a_cpu_is_said_while_it_lasts_and_ray_datas_own_warning_never(
    tmp_path: Path, chat_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capacity, "WAITING_SAID_EVERY_S", 0.5)
    monkeypatch.setattr(logging.getLogger("ray.data"), "propagate", True)
    ray.util.debug.reset_log_once("cpu_warning")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines(range(4))))
    holds = ray.remote(num_cpus=2)(lambda: time.sleep(2.0)).remote()
    time.sleep(0.5)  # until it holds both CPUs
    report = tokenise(tmp_path, chat_dir, rows)
    ray.get(holds)
    assert report.num_kept == {"train": 4}
    waits = [text for text in caplog.messages if "for a node with {CPU: 1} free" in text]
    assert len(waits) >= 2
    assert waits[0].startswith("the rows of train: waiting since ")
    assert "of the cluster's {CPU: 2}, {} is free" in waits[0]
    assert [text for text in caplog.messages if "will hang" in text] == []
