"""The page of an evaluation is made from its result alone, and shows everything that the result has."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rm_robust.evaluation.evaluate import figures_of
from rm_robust.evaluation.page import best_of_n_curve, write_page
from rm_robust.evaluation.suites import SUITES, Suite


def result_of(suite_name: str, rows: list[dict[str, Any]], scores: list[list[float]]) -> dict[str, Any]:
    suite: Suite = SUITES[suite_name]
    cases = [suite.parse(row) for row in rows]
    figures = {
        name: {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        for name, estimate in figures_of(suite, cases, scores).items()
    }
    return {
        "suite": suite_name, "checkpoint": "sha256:one", "num_cases": len(rows), "num_refused": 0,
        "notes": ["a <note>"], "interval": "95%", "figures": figures, "versions": {"torch": "2"},
        "files": [{"path": "a&b.jsonl", "sha256": "sha256:two"}],
    } | suite.details(cases, scores)  # fmt: skip


PAIRS = [{"prompt": f"Prompt {i}.", "chosen": "a", "rejected": "b"} for i in range(6)]
RANKINGS = [
    {"prompt": f"Prompt {i}.", "completions": ["a", "b", "c", "d"], "gold_scores": [0, 1, 2, 3]} for i in range(6)
]
STYLED = [
    {"id": i, "domain": "chat", "prompt": f"Prompt {i}.", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    for i in range(6)
]


class Pictures(HTMLParser):
    """The names of the pictures of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str | None] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.names.append(dict(attrs)["alt"])


@pytest.mark.parametrize(
    ("suite", "rows", "scores", "pictures"),
    [
        ("preferences", PAIRS, [[1.0, 0.0]] * 6, ["Reliability"]),
        ("preferences", RANKINGS, [[0.0, 1.0, 2.0, 3.0]] * 6, ["Best of n"]),
        ("rm_bench", STYLED, [[1.0, 2.0, 3.0, 1.0, 2.0, 3.0]] * 6, ["Styles"]),
    ],
)
def test_a_page_has_the_figures_and_the_pictures_of_its_suite(
    suite: str, rows: list[dict[str, Any]], scores: list[list[float]], pictures: list[str], tmp_path: Path
) -> None:
    result = result_of(suite, rows, scores)
    html = write_page(result, tmp_path).read_text()
    assert Pictures(html).names == pictures
    assert all(f"<td>{name}</td>" in html for name in result["figures"])
    assert "a &lt;note&gt;" in html
    assert "a&amp;b.jsonl" in html


def test_differences_have_their_p_values(tmp_path: Path) -> None:
    result = result_of("preferences", PAIRS, [[1.0, 0.0]] * 6)
    against = {
        "checkpoint": "sha256:other",
        "num_cases": 6,
        "differences": {"all.accuracy": {"value": 0.5, "low": None, "high": 1.0, "p_value": 0.0125}},
    }
    html = write_page(result | {"against": against}, tmp_path).read_text()
    cells = "".join(f'<td class="number">{number}</td>' for number in ("0.5000", "—", "1.0000", "0.0125"))
    assert f"<td>all.accuracy</td>{cells}" in html


def test_best_of_n_is_drawn_against_its_divergence() -> None:
    curve = best_of_n_curve(result_of("preferences", RANKINGS, [[0.0, 1.0, 2.0, 3.0]] * 6)["figures"])
    assert curve is not None
    points = curve.axes[0].lines[0].get_xydata().tolist()  # type: ignore[union-attr]
    assert [x for x, _ in points] == pytest.approx([0, 0.1931, 0.6363], abs=1e-4)  # log n - (n - 1)/n of 1, 2, 4
    assert [y for _, y in points] == pytest.approx([1.5, 14 / 6, 3])
