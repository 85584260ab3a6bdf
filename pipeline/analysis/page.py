"""Reports -> one HTML page that holds its tables, figures and provenance, and needs no network."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from jinja2 import Environment, StrictUndefined

from probsurgery.pipeline.analysis.figures import draw, prepare
from probsurgery.pipeline.analysis.kept_heads import HeadUncertainty, uncertainty_table
from probsurgery.pipeline.analysis.labels import value_text
from probsurgery.pipeline.analysis.projection import Projection
from probsurgery.pipeline.analysis.report import Report
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import write_atomically
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.lock import require_writable
from probsurgery.pipeline.store.manifest import software
from probsurgery.pipeline.store.target import refuse_own_files
from probsurgery.pipeline.texts import plain


def write_page(
    path: str | Path,
    reports: Sequence[Report],
    uncertainties: Sequence[HeadUncertainty] = (),
    projections: Sequence[Projection] = (),
) -> None:
    """Write the page. Raises `InputError` as `check_page` does."""
    check_page(path)
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_plain_text
    )
    template = environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    caches = list(dict.fromkeys(cache for report in reports for cache in report.caches))
    sections = [(f"Results: {report.arch}, {report.protocol}", report.tables) for report in reports]
    if uncertainties:
        names = {task: title for report in reports for task, title in report.titles.items()}
        sections.append(("Uncertainty", tuple(replace(uncertainty_table(h), titles=names) for h in uncertainties)))
    with TemporaryDirectory() as folder:
        titles = draw(reports, folder, uncertainties, projections)
        figures = [(title, b64encode(png.with_suffix(".svg").read_bytes()).decode()) for png, title in titles.items()]
    text = template.render(
        title="Representation surgery: " + ", ".join(Path(cache).name for cache in caches),
        version=software().get("probsurgery", ""),
        sections=sections,
        figures=[(title, f"data:image/svg+xml;base64,{svg}") for title, svg in figures],
        caches=[_provenance(Cache(cache)) for cache in caches],
    )
    write_atomically(Path(path), text)


def _plain_text(value: object) -> object:
    return plain(value) if isinstance(value, str) else value


def check_page(path: str | Path) -> None:
    """Raise `InputError` without matplotlib, or if there is no folder for the file."""
    prepare()
    refuse_own_files(Path(path), "--html")
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise InputError(f"cannot write a page to {path}; --html takes a file name in a folder that exists")
    require_writable(Path(path).absolute().parent, "--html")


def _provenance(cache: Cache) -> list[tuple[str, str]]:
    """What a cache was made from, according to its manifest."""
    manifest, identity, merge = cache.manifest, cache.identity, cache.identity.merge
    settings = ", ".join(f"{name}={value_text(value)}" for name, value in merge.settings.items())
    rows = [
        ("cache", str(cache.path)),
        ("architecture", f"{identity.arch}, d={identity.dim}, features in {identity.dtype}"),
        ("merge", (merge.name or merge.method) + (f" ({settings})" if settings else "")),
        ("identity, content", f"{cache.fingerprint}, {cache.content}"),
        ("created", f"{manifest.created} by {_listed(manifest.software)}"),
        ("preprocessing", _listed(identity.preprocessing or {})),
    ]
    for name, task in manifest.tasks.items():
        splits = [f"{split}: {s.rows:,} images, fingerprint {s.fingerprint}" for split, s in task.splits.items()]
        rows.append((f"task {name}", f"{task.classes} classes; {'; '.join(splits)}"))
    return rows + [(f"file of {name}", f"{file.source}, sha256 {file.sha256}") for name, file in manifest.files.items()]


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
