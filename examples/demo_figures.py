"""The demo from Python: features once, heads in seconds, then tables and figures.

    python examples/demo_figures.py [FOLDER]

writes a cache, figures and a page into FOLDER (default: demo); needs `pip install 'probsurgery[mini,plots]'`. A second
run finds everything there and only draws.
"""

import sys
from pathlib import Path

import probsurgery
from probsurgery.pipeline.analysis.figures import draw
from probsurgery.pipeline.analysis.kept_heads import projection, uncertainties
from probsurgery.pipeline.analysis.page import write_page
from probsurgery.pipeline.analysis.study import study
from probsurgery.pipeline.analysis.tables import to_markdown


def main(folder: Path) -> None:
    # Stage one: merged, expert and pre-trained encoders, once over every image.
    (cache,) = probsurgery.extract(probsurgery.ExtractConfig("mini", root=folder)).caches

    # Stage two: heads that are kept, as published; and Surgery with ProbSurgery's width and steps.
    for head in (
        probsurgery.head_settings("prob"),
        probsurgery.head_settings("surgery"),
        probsurgery.head_settings("surgery", rank=128, steps=5_000),
    ):
        probsurgery.fit(probsurgery.FitConfig(cache, head))

    # Two of the papers' analyses; a sweep over steps is one run.
    for name in ("rank", "steps"):
        study(name, probsurgery.SweepConfig(cache, seed=(0, 1, 2)))

    reports = probsurgery.report(cache)
    print(to_markdown([reports[0].accuracy, reports[0].bias, reports[0].costs]))

    opened = probsurgery.open_cache(cache)
    features = uncertainties(opened), [projection(opened)]
    for figure in draw(reports, folder / "figures", *features):
        print(figure.path)
    write_page(folder / "report.html", reports, *features)
    print(folder / "report.html")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
