"""The examples run as their first lines say."""

import re
from pathlib import Path

import processes

EXAMPLE = Path(__file__).parents[1] / "examples" / "demo_figures.py"


def test_the_demo_from_python(tmp_path):
    """On a copy with fewer images and steps, because the whole example takes a minute."""
    text = EXAMPLE.read_text()
    less = text.replace('ExtractConfig("mini", ', 'ExtractConfig("mini", tasks=("mnist", "fruit"), limit=40, ')
    less = less.replace('head_settings("prob")', 'head_settings("prob", steps=50)')
    less = less.replace('("rank", "steps")', '("rank",)')
    assert less.count("limit=40") == less.count("steps=50") == less.count('("rank",)') == 1
    done = processes.python(less, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| + ProbSurgery (h=128, 50 steps) |" in done.stdout
    written = {path.name for path in (tmp_path / "out" / "figures").glob("*.png")}
    assert {"bias.png", "rank.png", "projection.png", "calibration.png", "coverage.png"} <= written
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000
    assert re.search(r"out/report.html\n$", done.stdout)
