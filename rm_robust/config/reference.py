"""Describe every setting of a config class: its name, type and bounds, default and meaning, as text, TOML or Markdown.

The class is an argument, so that the configs of higher layers are described too. pipelines/settings.py is the command.
"""

import difflib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rm_robust.config.changes import on_resume
from rm_robust.config.shared import OnResume, section_in

TEXT_COLUMNS = 100
PAGE_COLUMNS = 110
NUM_NEAREST = 3
ON_RESUME = {
    OnResume.DECIDES_RESULTS: "",
    OnResume.MAY_GROW: "A resumed run may raise it.",
    OnResume.WHERE_IT_RUNS: "A resumed run may change it.",
}
"""What the meaning of a setting says about a resumed run. Most settings decide results, and a change is refused."""
LEAST_LIKENESS = 0.75
"""Least ratio of difflib at which a name counts as near to a misspelt one. 0.6 would also take names of one section
that have nothing else in common."""
LEAST_WORD = 3
"""Least number of letters of a word that is looked for within the names of settings."""
WORDS: dict[object, tuple[str, str]] = {
    bool: ("true or false", "booleans"),
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    Path: ("path", "paths"),
}
"""The name of a type, for one value and for several."""
BOUNDS = {
    "ge": ">= {}",
    "gt": "> {}",
    "le": "<= {}",
    "lt": "< {}",
    "min_length": "of length >= {}",
    "pattern": "that matches {}",
}
"""The words of each bound, by its attribute in a field's metadata, whose classes are not ours."""


@dataclass(frozen=True)
class Setting:
    """One setting, in words."""

    name: str
    """Dotted name from the top of the file, e.g. rloo.num_steps."""
    kind: str
    """Type and bounds, e.g. "integer >= 1"."""
    default: str | None
    """Default as TOML writes it. None: TOML has no word for it, because the setting is left out or is required."""
    is_required: bool
    meaning: str

    @property
    def default_in_words(self) -> str:
        return self.default or ("required" if self.is_required else "none")


@dataclass(frozen=True)
class Table:
    """One table of the TOML file with its own settings; a table below it is another one."""

    name: str
    """Dotted name; empty for the top of the file."""
    header: str
    """`[name]`, or `[[name]]` for each table of a list; empty for the top of the file."""
    is_left_out: bool
    """Whether the default is to have no such table."""
    meaning: str
    settings: tuple[Setting, ...]


def tables_of(kind: type[BaseModel]) -> list[Table]:
    """Return the tables of a config file of this class, in the order of its fields, each before those below it."""
    return list(_tables(kind, None, Table("", "", False, paragraph(kind.__doc__), ())))


def names_of(kind: type[BaseModel]) -> tuple[set[str], set[str]]:
    """Return the dotted names of all settings, and those of all tables."""
    tables = tables_of(kind)
    return {setting.name for table in tables for setting in table.settings}, {table.name for table in tables} - {""}


def nearest_names(name: str, kind: type[BaseModel]) -> list[str]:
    """Return the settings and tables that somebody may have meant who wrote this name, at most NUM_NEAREST.

    Those that only lie in another table come first, then those whose dotted names are most like it. Where there are
    none, they are those that have the last word of the name in their own last word, as bsr_scale has bsr.
    """
    settings, tables = names_of(kind)
    known, word = sorted(settings | tables), name.rpartition(".")[2]
    elsewhere = [other for other in known if other.rpartition(".")[2] == word]
    near = [
        *difflib.get_close_matches(name, elsewhere, NUM_NEAREST, 0.0),
        *difflib.get_close_matches(name, known, NUM_NEAREST, LEAST_LIKENESS),
    ] or [other for other in known if len(word) >= LEAST_WORD and word in other.rpartition(".")[2]]
    return list(dict.fromkeys(near))[:NUM_NEAREST]


def below(tables: Sequence[Table], name: str) -> list[Table]:
    """Return the tables with those settings alone that are `name` or below it, and without empty tables.

    Where there are none, a dotted `name` may be the beginning of names, as reward_model.bsr is of four.
    """
    return _holding(tables, f"{name}.") or (_holding(tables, name) if "." in name else [])


def _holding(tables: Sequence[Table], beginning: str) -> list[Table]:
    chosen = []
    for table in tables:
        settings = tuple(s for s in table.settings if f"{s.name}.".startswith(beginning))
        if settings:
            chosen.append(Table(table.name, table.header, table.is_left_out, table.meaning, settings))
    return chosen


def paragraph(docstring: str | None) -> str:
    """Return a docstring as one line."""
    return " ".join(inspect.cleandoc(docstring or "").split())


def _tables(kind: type[BaseModel], defaults: BaseModel | None, around: Table) -> Iterator[Table]:
    """Yield the table of a class, which `around` names, and the tables below it.

    `defaults` are the defaults that the class around gives; None takes those of the class itself.
    """
    settings: list[Setting] = []
    inner: list[tuple[type[BaseModel], BaseModel | None, Table]] = []
    for field_name, field in kind.model_fields.items():
        name = f"{around.name}.{field_name}".removeprefix(".")
        default = field.default if defaults is None else getattr(defaults, field_name)
        section = section_in(field.annotation)
        if section is not None and isinstance(default, section):
            meaning = f"{paragraph(field.description)} {paragraph(section.__doc__)}"
            inner.append((section, default, Table(name, f"[{name}]", around.is_left_out, meaning, ())))
            continue
        settings.append(_setting(name, field, default))
        if section is not None:
            header = f"[[{name}]]" if get_origin(field.annotation) in (list, tuple) else f"[{name}]"
            inner.append((section, None, Table(name, header, True, paragraph(section.__doc__), ())))
    yield Table(around.name, around.header, around.is_left_out, around.meaning, tuple(settings))
    for section, default, table in inner:
        yield from _tables(section, default, table)


def _setting(name: str, field: FieldInfo, default: Any) -> Setting:
    has_word = default is not None and default is not PydanticUndefined
    return Setting(
        name,
        f"{type_in_words(field.annotation)}{_bounds(field)}",
        toml_value(default) if has_word else None,
        default is PydanticUndefined,
        paragraph(f"{field.description or ''} {ON_RESUME[on_resume(field)]}"),
    )


def type_in_words(annotation: Any, *, plural: bool = False) -> str:
    """Return a field's type as a reader of TOML calls it. Raises TypeError for a type that no config has."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation][plural]
    if origin in (Union, UnionType):
        return " or ".join(type_in_words(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return ", ".join(map(toml_value, arguments))
    if origin is dict:
        return f"table of {type_in_words(arguments[1], plural=True)}"
    if origin in (list, tuple):
        number = f"{len(arguments)} " if origin is tuple and arguments[-1] is not Ellipsis else ""
        return f"list of {number}{type_in_words(arguments[0], plural=True)}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(toml_value(choice) for choice in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "tables" if plural else "table"
    raise TypeError(f"no words for the type {annotation!r}; add them to rm_robust/config/reference.py")


def _bounds(field: FieldInfo) -> str:
    """Return the bounds that pydantic checks, with a space before them."""
    values = [(words, getattr(bound, name, None)) for bound in field.metadata for name, words in BOUNDS.items()]
    bounds = ", ".join(words.format(value) for words, value in values if value is not None)
    return f" {bounds}" if bounds else ""


def toml_value(value: Any) -> str:
    """Return a value as TOML writes it. Python 3.11 reads TOML and does not write it."""
    if isinstance(value, Enum):
        return toml_value(value.value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())} }}" if value else "{}"
    return repr(value)


def as_text(tables: Sequence[Table]) -> str:
    """Return the settings for a terminal: a line `name = default  (type and bounds)`, and below it the meaning."""
    lines: list[str] = []
    for table in tables:
        if table.header:
            lines += [table.header, *_wrapped(table.meaning, "  "), ""]
        for setting in table.settings:
            first = f"{setting.name} = {setting.default_in_words}  ({setting.kind})"
            lines += [*textwrap.wrap(first, TEXT_COLUMNS, subsequent_indent=" " * 8, break_on_hyphens=False)]
            lines += [*_wrapped(setting.meaning, "    "), ""]
    return "\n".join(lines)


def as_toml(tables: Sequence[Table], given: Mapping[str, object]) -> str:
    """Return a file to start from. The values of `given` (by dotted name) are set, all others are comments.

    A comment without a space after the # is a setting that has its default, or, with nothing after the =, that is left
    out.
    """
    lines: list[str] = []
    for table in tables:
        if table.header:
            lines += [*_wrapped(table.meaning, "# "), f"{'#' if table.is_left_out else ''}{table.header}", ""]
        for setting in table.settings:
            lines += _wrapped(f"{setting.meaning} ({setting.kind})", "# ")
            key = setting.name.rpartition(".")[2]
            if setting.name in given:
                lines += [f"{key} = {toml_value(given[setting.name])}", ""]
            else:
                lines += [f"#{key} = {setting.default or ''}".rstrip(), ""]
    return "\n".join(lines)


def as_markdown(tables: Sequence[Table], *, top: str) -> str:
    """Return a heading, the meaning and a table of settings for each table. `top` is the heading of the file's top."""
    lines: list[str] = []
    for table in tables:
        lines += [f"### {f'`{table.header}`' if table.header else top}", ""]
        lines += [*_wrapped(table.meaning, "", columns=PAGE_COLUMNS), ""]
        lines += ["| setting | type and bounds | default | meaning |", "| --- | --- | --- | --- |"]
        for setting in table.settings:
            default = f"`{setting.default}`" if setting.default else setting.default_in_words
            cells = [f"`{setting.name}`", _code_of_choices(setting.kind), default, setting.meaning]
            assert "|" not in "".join(cells), f"a | in {setting.name} would end its cell"
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _code_of_choices(kind: str) -> str:
    """Return a type with its choices and its pattern as code, so that Markdown shows them as they are."""
    words, separator, pattern = kind.partition("that matches ")
    words = re.sub('"[^"]*"', r"`\g<0>`", words)
    return f"{words}{separator}`{pattern}`" if pattern else words


def _wrapped(text: str, indent: str, *, columns: int = TEXT_COLUMNS) -> list[str]:
    return textwrap.wrap(
        text, columns, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
