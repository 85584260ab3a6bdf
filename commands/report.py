"""`report` on the results of caches, and `transfer` of heads to other tasks and caches."""

from pathlib import Path
from typing import Annotated

from typer import Option

from probsurgery.commands.options import CacheFolder, JsonFormat, StoredResults, TableFormat
from probsurgery.commands.render import note, print_json, print_tables


def report_command(
    caches: Annotated[list[Path], Option("--cache", help="Folder of a cache; may be repeated.")],
    results: StoredResults = None,
    with_published: Annotated[
        bool, Option("--published", help="Add the figures published for this architecture, with differences.")
    ] = False,
    everything: Annotated[
        bool, Option("--all", help="Add a line for every setting of every sweep. [saved heads and defaults]")
    ] = False,
    uncertain: Annotated[
        bool, Option("--uncertainty", help="Add how well saved ProbSurgery heads predict their own errors.")
    ] = False,
    plots: Annotated[Path | None, Option(help="Write figures to this folder, as PNG and SVG.")] = None,
    page: Annotated[Path | None, Option("--html", help="Write everything to this file, as one page.")] = None,
    tsne: Annotated[bool, Option("--tsne", help="Project features by t-SNE. [PCA]")] = False,
    form: TableFormat = "text",
    as_json: JsonFormat = False,
) -> None:
    """Tables of the results stored with caches: accuracy, bias, costs of heads, and sweeps."""
    from probsurgery.pipeline.analysis.figures import draw, prepare
    from probsurgery.pipeline.analysis.kept_heads import uncertainties, uncertainty_table
    from probsurgery.pipeline.analysis.page import check_page, write_page
    from probsurgery.pipeline.analysis.projection import projection
    from probsurgery.pipeline.analysis.published import published
    from probsurgery.pipeline.analysis.report import report as make_reports
    from probsurgery.pipeline.store.cache import Cache

    form = "json" if as_json else form
    if page is not None:  # before the work
        check_page(page)
    reports = make_reports(caches, results, with_published=with_published, everything=everything)
    for arch, suite in dict.fromkeys((report.arch, report.suite) for report in reports):
        if with_published and not published(arch, suite):
            note(f"no figures were published for {arch} on {suite}")
    if plots is not None:
        prepare(plots)
    summarised = sum(report.others for report in reports)
    if summarised and not everything:
        note(f"{summarised:,} more settings of sweeps are only in the tables by setting; --all gives each a line")
    has_figures = plots is not None or page is not None
    opened = [Cache(path) for path in caches] if uncertain or has_figures else []
    measured = [head for cache in opened for head in uncertainties(cache, results)]
    if uncertain and not measured:
        note("no ProbSurgery head is saved with these caches; `probsurgery fit` saves one")
    method = "t-SNE" if tsne else "PCA"
    projections = [p for cache in opened if has_figures and (p := projection(cache, results, method))]
    if plots is not None:
        for path in draw(reports, plots, measured, projections):
            note(f"{path} and .svg")
    if page is not None:
        write_page(page, reports, measured, projections)
        note(f"{page}: written")
    uncertainty = [uncertainty_table(head) for head in measured] if uncertain else []
    if form == "json":
        print_json([report.to_json() for report in reports] + [{"uncertainty": t.to_json()} for t in uncertainty])
    else:
        titles = {task: title for report in reports for task, title in report.titles.items()}
        print_tables([table for report in reports for table in report.tables] + uncertainty, form, titles)


def transfer_command(
    cache: CacheFolder,
    on: Annotated[
        list[Path] | None, Option("--on", help="Another cache, for example of corrupted images; may be repeated.")
    ] = None,
    results: StoredResults = None,
    form: TableFormat = "text",
    as_json: JsonFormat = False,
) -> None:
    """Accuracy of saved heads on tasks and caches that they were not fitted on."""
    from probsurgery.pipeline.analysis.transfer import transfer
    from probsurgery.pipeline.store.cache import Cache

    print_tables(transfer(cache, on or (), results), "json" if as_json else form, Cache(cache).titles)
