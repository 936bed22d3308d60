"""What differs between the config of a run that has begun and the one it is resumed with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rm_robust.config.shared import OnResume, Section, section_in


@dataclass(frozen=True)
class Change:
    """One setting with another value than the run has begun with."""

    name: str
    """Dotted name."""
    earlier: Any
    now: Any
    on_resume: OnResume
    reason: str = ""
    """Why the setting decides results here; empty where it always does."""

    def __str__(self) -> str:
        return f"{self.name}: {self.earlier!r} there, {self.now!r} now{f' ({self.reason})' if self.reason else ''}"


def on_resume(field: FieldInfo | None) -> OnResume:
    """Return what a resumed run does with another value of a setting: refuse it, unless the field says otherwise."""
    declared = [entry for entry in (field.metadata if field else ()) if isinstance(entry, OnResume)]
    return declared[0] if declared else OnResume.DECIDES_RESULTS


def changes_between(earlier: Mapping[str, Any], now: Mapping[str, Any], config: Section) -> list[Change]:
    """Return the settings that differ, sorted by name. `now` holds every setting of `config`, as JSON has them."""
    return list(_changes(earlier, now, type(config), config.held_on_resume(), ""))


def _changes(
    earlier: Mapping[str, Any], now: Mapping[str, Any], kind: type[BaseModel], held: Mapping[str, str], at: str
) -> Iterator[Change]:
    for key in sorted({*earlier, *now}):
        field, name = kind.model_fields.get(key), f"{at}{key}"
        before, after = earlier.get(key), now.get(key)
        section = None if field is None else section_in(field.annotation)
        if section is not None and isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, section, held, f"{name}.")
        elif section is not None and isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
            for place, (one, other) in enumerate(zip(before, after, strict=True)):
                yield from _changes(one, other, section, held, f"{name}.{place}.")
        elif before != after:
            kind_of_change = OnResume.DECIDES_RESULTS if name in held else on_resume(field)
            yield Change(name, before, after, kind_of_change, held.get(name, ""))
