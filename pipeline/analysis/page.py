"""Reports -> one HTML page that holds its tables, figures and provenance, and needs no network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2

from probsurgery.pipeline.analysis.figures import draw, prepare
from probsurgery.pipeline.analysis.kept_heads import HeadUncertainty, Projection, uncertainty_table
from probsurgery.pipeline.analysis.report import Report
from probsurgery.pipeline.analysis.tables import Table
from probsurgery.pipeline.config import number_text
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import write_atomically
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import software


def write_page(
    path: str | Path,
    reports: Sequence[Report],
    uncertainties: Sequence[HeadUncertainty] = (),
    projections: Sequence[Projection] = (),
) -> None:
    """Write the page. Raises `InputError` as `check_page` does."""
    check_page(path)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    template = environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    caches = list(dict.fromkeys(cache for one in reports for cache in one.caches))
    text = template.render(
        title="Representation surgery: " + ", ".join(Path(cache).name for cache in caches),
        version=software().get("probsurgery", ""),
        sections=_sections(reports, uncertainties),
        figures=_figures(reports, uncertainties, projections),
        caches=[_provenance(Cache(cache)) for cache in caches],
    )
    write_atomically(Path(path), text)


def check_page(path: str | Path) -> None:
    """Raise `InputError` without matplotlib, or if there is no folder for the file."""
    prepare(None)
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise InputError(f"cannot write a page to {path}; --html takes a file name in a folder that exists")


def _sections(reports: Sequence[Report], uncertainties: Sequence[HeadUncertainty]) -> list[tuple[str, list[Table]]]:
    sections = [(f"Results: {one.arch}, {one.protocol}", list(one.tables)) for one in reports]
    return sections + ([("Uncertainty", [*map(uncertainty_table, uncertainties)])] if uncertainties else [])


def _figures(
    reports: Sequence[Report], uncertainties: Sequence[HeadUncertainty], projections: Sequence[Projection]
) -> list[tuple[str, str]]:
    """Each figure's caption, and itself as an address that holds it."""
    with TemporaryDirectory() as folder:
        drawn = draw(reports, folder, uncertainties, projections)
        svgs = [(one.title, one.path.with_suffix(".svg").read_bytes()) for one in drawn]
    return [(title, "data:image/svg+xml;base64," + b64encode(svg).decode()) for title, svg in svgs]


def _provenance(cache: Cache) -> list[tuple[str, str]]:
    """What a cache was made from, as its manifest says."""
    manifest, identity = cache.manifest, cache.identity
    merge = identity["merge"]
    settings = ", ".join(f"{k}={number_text(v) if isinstance(v, float) else v}" for k, v in merge["settings"].items())
    rows = [
        ("cache", str(cache.path)),
        ("architecture", f"{identity['arch']}, d={cache.dim}, features in {identity['dtype']}"),
        ("merge", f"{merge.get('name') or merge['method']}{f' ({settings})' if settings else ''}"),
        ("identity, content", f"{cache.fingerprint}, {cache.content}"),
        ("made", f"{manifest.get('created')} by " + _listed(manifest.get("software", {}))),
        ("preprocessing", _listed(identity["preprocessing"])),
    ]
    for task, about in manifest["tasks"].items():
        splits = "; ".join(
            f"{split}: {data['rows']:,} images, fingerprint {data['fingerprint']}"
            for split, data in about["splits"].items()
        )
        rows.append((f"task {task}", f"{about.get('classes', '?')} classes; {splits}"))
    for name, file in manifest.get("files", {}).items():
        rows.append((f"file of {name}", f"{file.get('source')}, sha256 {file.get('sha256')}"))
    return rows


def _listed(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
