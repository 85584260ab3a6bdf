"""Figures show the results and the features; the files are valid, and the same from one run to the next."""

import builtins
import re
import sys
from itertools import product

import pytest
import torch
from PIL import Image

from probsurgery.pipeline.analysis import figures
from probsurgery.pipeline.analysis.kept_heads import kept_heads, uncertainties, uncertainty_table
from probsurgery.pipeline.analysis.projection import projection
from probsurgery.pipeline.analysis.report import report
from probsurgery.pipeline.config import FitConfig, ProbSettings, SurgerySettings, SweepConfig
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.fitting.sweep import sweep
from probsurgery.pipeline.store.cache import Cache
from support import refused, write_cache

PROB = ProbSettings(hidden=8, steps=60)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A cache with two kept heads and sweeps of rank, loss, and width with KL weight."""
    path = write_cache(tmp_path_factory.mktemp("figures") / "cache", {"a": 120, "b": 40})
    for settings in (PROB, SurgerySettings(rank=4, steps=60)):
        fit(FitConfig(path, settings))
    sweep(SweepConfig(path, ("surgery",), {"rank": (2, 4, 8), "steps": (20, 60)}, seed=(0, 1)))
    sweep(SweepConfig(path, ("surgery",), {"loss": ("l1", "mse"), "rank": (4,), "steps": (60,)}))
    sweep(SweepConfig(path, values={"hidden": (4, 8), "kl_weight": (0.0, 1e-4, 1e-2), "steps": (60,)}, seed=(0, 1)))
    return path


@pytest.fixture(scope="module")
def drawn(results):
    """Every figure by its name."""
    cache = Cache(results)
    with figures._matplotlib_style():
        return dict(figures._figures(report(results), uncertainties(cache), [projection(cache)]))


def test_every_figure_that_the_results_allow_is_there(drawn):
    assert set(drawn) == {
        "bias",
        "rank",
        "hidden",
        "kl-weight",
        "steps",
        "loss",
        "hidden-kl-weight",
        "calibration",
        "coverage",
        "projection",
    }


def test_bars_are_the_biases(drawn, results):
    (axes,) = drawn["bias"].axes
    (result,) = report(results)
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [line.values[c].mean for line in result.bias.lines for c in ("a", "b", "Avg")]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b", "Avg"]


def test_curves_and_bands_are_means_and_deviations(drawn, results):
    (result,) = report(results)
    (curve,) = [curve for curve in result.curves if curve.axis == "rank"]
    for axes, measure in zip(drawn["rank"].axes, ("accuracy", "bias"), strict=True):
        (line,) = [line for line in axes.lines if len(line.get_xdata()) == 3]
        spreads = [getattr(point, measure)["Avg"] for point in curve.points.values()]
        assert list(line.get_xdata()) == [2, 4, 8]
        assert list(line.get_ydata()) == [s.mean for s in spreads]
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert band.max() == pytest.approx(max(s.mean + s.sd for s in spreads))
        assert band.min() == pytest.approx(min(s.mean - s.sd for s in spreads))


def test_a_heat_map_has_every_cell(drawn, results):
    (result,) = report(results)
    (grid,) = result.grids
    widths, weights = [4, 8], [0.0, 1e-4, 1e-2]
    assert list(grid.points) == list(product(widths, weights))
    for axes, measure in zip(drawn["hidden-kl-weight"].axes, ("accuracy", "bias"), strict=True):
        shown = axes.images[0].get_array()
        for i, width in enumerate(widths):
            for j, weight in enumerate(weights):
                assert shown[i, j] == getattr(grid.points[width, weight], measure)["Avg"].mean
        assert len(axes.texts) == 6


def test_a_projection_is_of_the_features(results):
    cache = Cache(results)
    projected = projection(cache)
    assert projected.label == next(kept_heads(cache)).label
    merged, points = cache.features("b"), projected.points["b"]
    assert {kind: tuple(values.shape) for kind, values in points.items()} == dict.fromkeys(
        ("merged", "corrected", "expert"), (40, 2)
    )
    # In a plane of an orthogonal projection, distances shrink and never grow.
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    far, near = (
        torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") for x in (merged[order], points["merged"])
    )
    assert (near <= far + 1e-4).all()
    assert near.max() > 0.3 * far.max()
    moved = (points["corrected"] - points["expert"]).norm(dim=1).mean()
    assert moved < (points["merged"] - points["expert"]).norm(dim=1).mean()
    assert torch.equal(projection(cache).points["a"]["expert"], projected.points["a"]["expert"])


def test_tsne_on_request(results):
    cache = Cache(results)
    tsne = projection(cache, method="t-SNE")
    assert tsne.method == "t-SNE"
    assert tsne.points["a"]["expert"].isfinite().all()
    assert not torch.allclose(tsne.points["a"]["expert"], projection(cache).points["a"]["expert"])


def test_uncertainty_is_of_kept_probabilistic_heads_only(results, tmp_path):
    (head,) = uncertainties(Cache(results))
    assert list(head.tasks) == ["a", "b"]
    table = uncertainty_table(head)
    (result,) = report(results)
    (line,) = [line for line in result.accuracy.lines if line.label == "+ ProbSurgery (h=8, 60 steps)"]
    rows = fit(FitConfig(results, PROB)).rows
    for row, shown in zip(rows, table.lines, strict=False):
        assert shown.values["acc. at 100%"] == pytest.approx(100 * row.accuracy.head)
    assert line.label == f"+ {head.label}"
    assert "transductive" in table.title


def test_heads_of_other_data_are_left_out(results, tmp_path):
    other = write_cache(tmp_path / "other", {"a": 121, "b": 40})
    assert list(kept_heads(Cache(other), results)) == []
    assert projection(Cache(other), results) is None


def test_the_command_writes_both_forms_the_same_twice(results, run, tmp_path):
    for folder in ("one", "two"):
        status, out, err = run("report", "--cache", results, "--plots", tmp_path / folder, "--uncertainty")
        assert status == 0
        assert "Uncertainty of ProbSurgery (h=8, 60 steps)" in out
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 20
    for name in files:
        path = tmp_path / "one" / name
        if name.endswith(".png"):
            with Image.open(path) as image:
                image.load()
                assert image.width > 500
                assert f"{path} and .svg" not in err
                assert f"{tmp_path / 'two' / name} and .svg" in err
        else:
            text = path.read_text()
            assert text == (tmp_path / "two" / name).read_text()
            # Nothing is fetched: names of formats and of the drawing's own parts are all that it refers to.
            assert not re.search(r'(?:href|src)="(?!#|data:)', text)


def test_colours_are_told_apart_by_colour_blind_readers():
    """Under the common simulations of missing cones (Machado et al., 2009) no two colours fall together."""
    simulations = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    rgb = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in figures.COLOURS])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in simulations.values():
        seen = (linear @ torch.tensor(matrix).T).clamp(0, 1)
        apart = torch.cdist(seen, seen) + torch.eye(len(seen))
        assert apart.min() > 0.1
    assert len(set(figures.MARKERS)) == len(figures.COLOURS)


def test_without_matplotlib_the_error_says_what_to_install(results, run, tmp_path, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *rest, **named):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **named)

    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    refused(run("report", "--cache", results, "--plots", tmp_path / "x"), "pip install 'probsurgery[plots]'")


def test_a_folder_that_cannot_be_created_is_refused(results, run, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run("report", "--cache", results, "--plots", tmp_path / "file"), tmp_path / "file", "is a file", "--plots")
