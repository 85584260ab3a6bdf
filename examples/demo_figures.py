"""The demo from Python: features once, heads in seconds, then tables and figures.

    python examples/demo_figures.py [FOLDER]

writes a cache, figures and a page into FOLDER (default: demo); needs `pip install 'probsurgery[mini,plots]'`. A second
run reuses the cache and its heads, and only draws.
"""

import sys
from pathlib import Path

import probsurgery
from probsurgery.pipeline.analysis.figures import draw
from probsurgery.pipeline.analysis.kept_heads import uncertainties
from probsurgery.pipeline.analysis.page import write_page
from probsurgery.pipeline.analysis.projection import projection
from probsurgery.pipeline.analysis.study import study
from probsurgery.pipeline.analysis.tables import to_markdown


def main(folder: Path) -> None:
    # Stage one: each image goes once through the merged, the expert and the pre-trained encoders.
    (cache,) = probsurgery.extract(probsurgery.ExtractConfig("mini", root=folder)).caches

    # Stage two: both heads as published, and Surgery with ProbSurgery's width and steps.
    for head in (
        probsurgery.head_settings("prob"),
        probsurgery.head_settings("surgery"),
        probsurgery.head_settings("surgery", rank=128, steps=5_000),
    ):
        probsurgery.fit(probsurgery.FitConfig(cache, head))

    # Two of the papers' analyses; the sweep over steps trains each head once.
    for name in ("rank", "steps"):
        study(name, probsurgery.SweepConfig(cache, seed=(0, 1, 2)))

    reports = probsurgery.report(cache)
    print(to_markdown([reports[0].accuracy, reports[0].bias, reports[0].costs]))

    opened = probsurgery.open_cache(cache)
    projected = projection(opened)
    from_features = uncertainties(opened), [projected] if projected else []
    for path in draw(reports, folder / "figures", *from_features):
        print(path)
    write_page(folder / "report.html", reports, *from_features)
    print(folder / "report.html")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
