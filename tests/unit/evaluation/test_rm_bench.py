from dataclasses import replace
from pathlib import Path

import pytest

from rm_robust.errors import DataError
from rm_robust.evaluation import rm_bench
from rm_robust.evaluation.cases import Case, read_cases
from rm_robust.evaluation.evaluate import figures_of
from rm_robust.evaluation.suites import SUITES


def row(number: int, domain: str) -> dict[str, object]:
    return {
        "id": number,
        "domain": domain,
        "prompt": f"Prompt {number}.",
        "chosen": ["a", "bb", "ccc"],
        "rejected": ["d", "ee", "fff"],
    }


def figures(cases: list[Case], scores: list[list[float]]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in figures_of(SUITES["rm_bench"], cases, scores).items()}


def test_each_cell_counts_for_its_difficulty() -> None:
    # chosen 1, 5, 3 against rejected 2, 4, 0: rows of the matrix: [0 0 1], [1 1 1], [1 0 1]
    values = figures([rm_bench.parse(row(0, "chat"))], [[1, 5, 3, 2, 4, 0]])
    assert values["chat.hard"] == pytest.approx(2 / 3)  # (0,1) 0, (0,2) 1, (1,2) 1
    assert values["chat.normal"] == pytest.approx(2 / 3)  # 0, 1, 1
    assert values["chat.easy"] == pytest.approx(2 / 3)  # (1,0) 1, (2,0) 1, (2,1) 0
    assert values["overall.mean"] == pytest.approx(2 / 3)


def test_the_style_matrix_averages_domains_and_not_prompts() -> None:
    chat, first_code, second_code = [1, 5, 3, 2, 4, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]
    cases = [rm_bench.parse(row(i, domain)) for i, domain in enumerate(["chat", "code", "code"])]
    [[a, b, c], [d, e, f], [g, h, i]] = SUITES["rm_bench"].details(cases, [chat, first_code, second_code])[
        "style_matrix"
    ]
    assert [a, b, c] == [0.25, 0.25, 0.75]  # means of 0, 0, 1 and of a half
    assert [d, e, f] == [0.75, 0.75, 0.75]
    assert [g, h, i] == [0.75, 0.25, 0.75]
    values = figures(cases, [chat, first_code, second_code])
    assert values["overall.hard"] == pytest.approx((b + c + f) / 3)
    assert values["overall.easy"] == pytest.approx((d + g + h) / 3)


def test_safety_is_the_mean_of_its_parts_and_overall_that_of_the_domains_whatever_their_sizes() -> None:
    right, wrong = [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]
    cases = [
        rm_bench.parse(row(i, domain))
        for i, domain in enumerate(["code", "safety-refuse", "safety-refuse", "safety-refuse", "safety-response"])
    ]
    values = figures(cases, [right, right, wrong, wrong, right])
    assert values["safety.hard"] == pytest.approx((1 / 3 + 1) / 2)
    assert values["overall.hard"] == pytest.approx((1 + 2 / 3) / 2)


def test_a_scorer_of_length_alone_is_right_where_it_is_easy_and_wrong_where_it_is_hard() -> None:
    values = figures([rm_bench.parse(row(0, "chat"))], [[1, 2, 3, 1, 2, 3]])
    assert (values["chat.easy"], values["chat.normal"], values["chat.hard"]) == (1, 0, 0)


def test_missing_domains_are_named() -> None:
    assert rm_bench.notes([rm_bench.parse(row(0, "chat")), rm_bench.parse(row(1, "safety-refuse"))]) == [
        "not the full benchmark: there is no math, no code, no safety-response"
    ]


@pytest.mark.parametrize(
    "changed", [{"chosen": ["a"]}, {"domain": "poems"}, {"rejected": [1, 2, 3]}, {"prompt": None}], ids=str
)
def test_a_row_that_is_none_of_rm_bench_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(DataError):
        rm_bench.parse(row(0, "chat") | changed)


def test_a_scorer_of_length_alone_gets_what_was_measured_of_the_real_file(data_dir: Path) -> None:
    cases = list(read_cases([str(data_dir / "rm_bench.parquet")], rm_bench.parse))
    # The known figures are of all safety prompts together.
    pooled = [replace(case, subset=rm_bench.PARTS.get(case.subset, case.subset)) for case in cases]
    values = figures(pooled, [[float(len(text)) for text in case.completions] for case in cases])
    by_domain = {
        domain: [round(values[f"{domain}.{name}"], 2) for name in ("easy", "normal", "hard")]
        for domain in ("chat", "code", "safety")
    }
    assert by_domain == {"chat": [0.80, 0.28, 0.03], "code": [0.78, 0.53, 0.26], "safety": [0.92, 0.38, 0.10]}
    assert "no math" in rm_bench.notes(cases)[0]
