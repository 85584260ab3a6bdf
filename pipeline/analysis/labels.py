"""Head settings in tables: which rows are of one setting, how it departs from the defaults, and its label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict

from probsurgery.pipeline.config import HEAD_SETTINGS, number_text
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.store.results import ResultRow

_WIDTHS = {settings.width_name for settings in HEAD_SETTINGS.values()}


def setting_digest(row: ResultRow) -> str:
    """Digest of a head's setting and protocol: rows of several tasks and seeds that share it are one line."""
    shared_by = row.tasks if row.shared else None
    return fingerprint([row.kind, row.settings, shared_by, row.is_tf32, row.protocol])


def by_setting(rows: Iterable[ResultRow]) -> list[list[ResultRow]]:
    """Rows of each setting and protocol, in order of first appearance."""
    groups: dict[str, list[ResultRow]] = defaultdict(list)
    for row in rows:
        groups[setting_digest(row)].append(row)
    return list(groups.values())


def departures(row: ResultRow, leave_out: Collection[str] = ()) -> dict[str, object]:
    """Settings that differ from the default of this kind of head."""
    defaults = asdict(HEAD_SETTINGS[row.kind]()) if row.kind in HEAD_SETTINGS else {}
    return {name: v for name, v in row.settings.items() if name not in leave_out and v != defaults.get(name)}


def departure_count(row: ResultRow, leave_out: Collection[str] = ()) -> int:
    """In how many ways a fit differs from the default one, for its kind of head."""
    return len(departures(row, leave_out)) + row.shared + ("fraction" not in leave_out and row.fraction != 1)


def sort_key(row: ResultRow, leave_out: Collection[str] = ()) -> tuple:
    """Order of settings of one kind of head: private heads first, then by fraction, width, and the other settings."""
    settings = [(name, value) for name, value in row.settings.items() if name not in leave_out]
    settings.sort(key=lambda item: item[0] not in _WIDTHS)
    values = [(0, v, "") if isinstance(v, int | float) else (1, 0, str(v)) for _, v in settings]
    return row.shared, row.fraction, values


def head_label(row: ResultRow, leave_out: Collection[str] = ()) -> str:
    """A head's name in a table: its kind, width, steps, and whatever departs from the default."""
    kind = HEAD_SETTINGS.get(row.kind)
    details, always_named = [], set()
    if kind and kind.is_trained:
        width = kind.width_name
        always_named = {width, "steps"}
        if width not in leave_out:
            details.append(f"{width[0]}={row.settings.get(width, '?')}")
        if "steps" not in leave_out and not row.is_online:
            details.append(f"{row.settings.get('steps', '?')} steps")
    implied = {"batch_size"} if row.is_online else set()
    others = departures(row, {*always_named, *implied, *leave_out})
    details += [f"{name.replace('_', '-')}={value_text(value)}" for name, value in others.items()]
    if row.fraction != 1 and "fraction" not in leave_out:
        details.append(f"{100 * row.fraction:g} % of the rows")
    details += ["shared"] * row.shared + ["tf32"] * row.is_tf32
    return (kind.title if kind else row.kind) + (f" ({', '.join(details)})" if details else "")


def value_text(value: object) -> str:
    """A setting's value as text."""
    return number_text(value) if isinstance(value, float) else str(value)
