"""What was fitted on the features that a cache holds now: result rows, and heads in their folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from probsurgery.pipeline.analysis.settings import head_label
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads.head import Head, load_head
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import ResultRow


@dataclass(frozen=True)
class SavedHead:
    """A head with its name in tables."""

    label: str
    protocol: str
    head: Head


def saved_heads(cache: Cache, results: Path | None = None) -> Iterator[SavedHead]:
    """The heads saved with a cache, defaults first. Damaged heads are skipped, and those fitted on other features."""
    paths = [path for path in ((results or cache.path) / "heads").glob("[!.]*") if path.is_dir()]
    for path in sorted(paths, key=lambda path: (path.name.count("-"), path.name)):
        try:
            head = load_head(path)
        except InputError:  # `fit` reports damaged heads
            continue
        rows = [*head.record.results] if head.record else []
        if rows and head.dim == cache.dim and current_rows(rows, cache) == rows:
            seed = f", seed {rows[0].seed}" if rows[0].seed else ""
            yield SavedHead(head_label(rows[0]) + seed, rows[0].protocol, head)


def current_rows(rows: Iterable[ResultRow], cache: Cache) -> list[ResultRow]:
    """The rows whose heads were fitted on the features that the cache holds now."""
    tasks = cache.manifest.tasks.items()
    current = {name: cache.task_fingerprint(name) for name, task in tasks if "test" in task.splits}
    return [row for row in rows if row.cache == current.get(row.task)]
