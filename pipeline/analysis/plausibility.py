"""Experts that look as if labels, classes or checkpoints had been confused."""

import math
from collections.abc import Iterable

from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import ResultRow


def implausible_experts(rows: Iterable[ResultRow], cache: Cache) -> list[str]:
    """A line for the tasks whose expert is not above chance, and one for those whose expert is below the merged model.

    Not above chance: no more than two standard errors above 1 / C, for C classes.
    """
    by_chance, below_merged = {}, {}
    for row in rows:
        classes = cache.manifest.tasks[row.task].classes
        chance, expert, merged = 1 / max(1, classes), row.accuracy.individual, row.accuracy.merged
        if expert is None or merged is None:
            continue
        error = math.sqrt(chance * (1 - chance) / (row.eval_rows or cache.rows(row.task)))
        if expert <= chance + 2 * error < 1:
            by_chance[row.task] = f"{row.task} ({100 * expert:.1f} % of {classes} classes)"
        elif expert < merged:
            below_merged[row.task] = f"{row.task} ({100 * expert:.1f} %, merged {100 * merged:.1f} %)"
    lines = []
    if by_chance:
        named = ", ".join(by_chance.values())
        lines.append(f"experts not above chance: {named}; are labels and classes in the same order?")
    if below_merged:
        named = ", ".join(below_merged.values())
        lines.append(f"experts below the merged model: {named}; are these the tasks' own checkpoints?")
    return lines
