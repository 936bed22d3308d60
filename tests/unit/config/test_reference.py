"""Every setting has a meaning, and the reference says its name, type, bounds and default as the class has them."""

import tomllib
from enum import StrEnum
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from rm_robust.config.reference import (
    Setting,
    as_markdown,
    as_text,
    as_toml,
    below,
    nearest_names,
    tables_of,
    toml_value,
    type_in_words,
)
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import Section
from rm_robust.responses.config import ResponsesConfig
from serve.settings import ServiceSettings
from tests.unit.config.test_run import sections


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Wheel(Section):
    """One wheel."""

    radius_m: float = Field(default=0.5, gt=0, lt=2)
    """Radius in metres."""


class Bell(Section):
    """A bell
    that rings."""

    tone: str = Field(pattern="^[a-g]$")
    """Tone of the bell."""


class Bicycle(Section):
    """A bicycle."""

    owner: str = Field(min_length=1)
    """Who owns it."""
    colour: Colour = Colour.RED
    """Colour of the frame."""
    front: Wheel = Wheel(radius_m=0.7)
    """The wheel in front."""
    bells: tuple[Bell, ...] = ()
    """Bells of the bicycle."""
    spare: Wheel | None = None
    """A further wheel. None: no further wheel."""
    gears: Literal[1, 3] = 1
    """Number of gears."""
    loads: dict[str, float] = {}
    """Weights in kg."""
    range_km: tuple[float, float] | None = None
    """Shortest and longest way."""


def setting(name: str, kind: str, default: str | None, meaning: str, *, is_required: bool = False) -> Setting:
    return Setting(name, kind, default, is_required, meaning)


def test_a_class_becomes_tables_in_the_order_of_its_fields() -> None:
    top, front, bells, spare = tables_of(Bicycle)
    assert (top.header, top.meaning) == ("", "A bicycle.")
    assert list(top.settings) == [
        setting("owner", "text of length >= 1", None, "Who owns it.", is_required=True),
        setting("colour", '"red", "blue"', '"red"', "Colour of the frame."),
        setting("bells", "list of tables", "[]", "Bells of the bicycle."),
        setting("spare", "table", None, "A further wheel. None: no further wheel."),
        setting("gears", "1, 3", "1", "Number of gears."),
        setting("loads", "table of numbers", "{}", "Weights in kg."),
        setting("range_km", "list of 2 numbers", None, "Shortest and longest way."),
    ]
    assert (front.header, front.is_left_out, front.meaning) == ("[front]", False, "The wheel in front. One wheel.")
    assert list(front.settings) == [setting("front.radius_m", "number > 0, < 2", "0.7", "Radius in metres.")]
    assert (bells.header, bells.is_left_out, bells.meaning) == ("[[bells]]", True, "A bell that rings.")
    assert list(bells.settings) == [
        setting("bells.tone", "text that matches ^[a-g]$", None, "Tone of the bell.", is_required=True)
    ]
    assert (spare.header, spare.is_left_out) == ("[spare]", True)
    assert list(spare.settings) == [setting("spare.radius_m", "number > 0, < 2", "0.5", "Radius in metres.")]


@pytest.mark.parametrize("kind", [PipelineConfig, ResponsesConfig, ServiceSettings])
def test_every_setting_of_every_section_has_a_meaning_in_whole_sentences(kind: type[BaseModel]) -> None:
    own = [kind, *sections(kind)] if issubclass(kind, Section) else [kind]
    without = [
        f"{section.__name__}.{name}"
        for section in own
        for name, field in section.model_fields.items()
        if not (field.description or "").endswith(".")
    ]
    without += [
        s.name for t in tables_of(kind) if t.name != "api_keys" for s in t.settings if not s.meaning.endswith(".")
    ]
    assert without == [], "write a docstring below each of these fields"


def leaves(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Return the values of a config by dotted name. An empty table is a value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{at}{name}.") if isinstance(value, dict) and value else {f"{at}{name}": value}
    return found


def test_the_reference_has_every_value_of_the_resolved_default_config() -> None:
    resolved = leaves(PipelineConfig(name="a").model_dump(mode="json"))
    settings = [s for table in tables_of(PipelineConfig) if not table.is_left_out for s in table.settings]
    assert {s.name for s in settings} == resolved.keys()
    defaults = {s.name: None if s.default is None else tomllib.loads(f"v = {s.default}")["v"] for s in settings}
    assert defaults == {**resolved, "name": None}


@pytest.mark.parametrize(
    "value", [True, 3, -0.5, 1e-6, 'a "quoted" \\ text\n', ["a", "b"], [1.5, 2.0], {"gpu": 0.5, "x": 1.0}, {}, []]
)
def test_values_are_written_as_toml_reads_them(value: object) -> None:
    assert tomllib.loads(f"v = {toml_value(value)}") == {"v": value}


def test_a_type_without_words_is_refused() -> None:
    with pytest.raises(TypeError, match="no words for the type <class 'bytes'>"):
        type_in_words(bytes)


def test_what_is_below_a_name_is_chosen_by_whole_parts() -> None:
    tables = tables_of(PipelineConfig)
    assert {table.name.partition(".")[0] for table in below(tables, "rloo")} == {"rloo"}
    (table,) = below(tables, "rloo.num_steps")
    assert [s.name for s in table.settings] == ["rloo.num_steps"]
    assert below(tables, "rlo") == []
    (table,) = below(tables, "reward_model.bsr")  # the beginning of dotted names
    names = [s.name for s in table.settings]
    assert names == [f"reward_model.bsr_{name}" for name in ("coefficient", "scale", "scope", "micro_pairs")]
    assert [table.name for table in below(tables, "rloo.optimizer")] == ["rloo.optimizer"]


def test_near_names_are_near_and_others_are_none() -> None:
    assert nearest_names("rlo.num_steps", PipelineConfig)[0] == "rloo.num_steps"
    assert nearest_names("sft.kl_coefficient", PipelineConfig) == ["rloo.kl_coefficient"]
    assert set(nearest_names("learning_rate", PipelineConfig)) == {
        f"{stage}.optimizer.learning_rate" for stage in ("sft", "reward_model", "rloo")
    }
    assert nearest_names("rloo.qqq", PipelineConfig) == []
    near = nearest_names("bsr", PipelineConfig)
    assert len(near) == 3
    assert all(name.startswith("reward_model.bsr_") for name in near)
    assert nearest_names("xy", PipelineConfig) == []


def test_text_has_short_lines_and_a_line_for_each_setting() -> None:
    text = as_text(tables_of(PipelineConfig))
    assert max(map(len, text.splitlines())) <= 100
    assert "\nrloo.num_steps = 60  (integer >= 1)\n    Number of steps." in text
    assert "\nmodel.path = none  (text)\n" in text


def test_toml_sets_what_is_given_and_comments_the_rest() -> None:
    toml = as_toml(tables_of(Bicycle), {"owner": "Ada"})
    assert tomllib.loads(toml) == {"owner": "Ada", "front": {}}
    for line in ('#colour = "red"', "[front]", "#radius_m = 0.7", "#[spare]", "#[[bells]]", "#tone =", "#range_km ="):
        assert line in toml.splitlines()


def test_markdown_has_a_table_for_each_section() -> None:
    page = as_markdown(tables_of(Bicycle), top="Top")
    assert "### Top\n\nA bicycle.\n" in page
    assert "### `[[bells]]`\n" in page
    assert '| `colour` | `"red"`, `"blue"` | `"red"` | Colour of the frame. |' in page.splitlines()
    assert "| `bells.tone` | text that matches `^[a-g]$` | required | Tone of the bell. |" in page.splitlines()
    assert "| `spare` | table | none | A further wheel. None: no further wheel. |" in page.splitlines()
