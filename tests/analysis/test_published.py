"""Published figures, marked as such, beside the same methods measured here."""

from dataclasses import asdict
from statistics import fmean

import pytest
from msgspec.structs import replace

from probsurgery.pipeline.analysis.published import published, published_lines, published_name
from probsurgery.pipeline.analysis.report import report
from probsurgery.pipeline.analysis.tables import DIFFERENCE, PUBLISHED
from probsurgery.pipeline.config import FitConfig, ProbSettings, RidgeSettings, SurgerySettings
from probsurgery.pipeline.datasets.suites import suite_tasks
from probsurgery.pipeline.fitting.fit import fit
from support import edit_manifest, write_cache


def test_published_figures_are_the_papers():
    rows = {row["method"]: row for row in published("vitl14", "clip8") if row["source"].startswith("Surgery")}
    assert (rows["ta"]["Avg"], rows["ta+surgery(r=16)"]["Avg"], rows["individual"]["DTD"]) == ("84.5", "89.0", "84.1")
    assert published("mini", "mini") == []


@pytest.mark.parametrize(
    ("suite", "tasks", "individual", "ta"), [("clip14", 14, "89.25", "65.3"), ("clip20", 20, "89.77", "60.5")]
)
def test_published_figures_of_14_and_20_tasks_name_their_family_of_experts(suite, tasks, individual, ta):
    rows = {(row["family"], row["method"]): row for row in published("vitb32", suite)}
    experts = rows["FusionBench", "individual"]
    figures = [float(experts[task.title]) for task in suite_tasks(suite).values()]
    assert len(figures) == tasks
    assert experts["Avg"] == individual == f"{fmean(figures):.2f}"
    iso = [row for row in published("vitb32", suite) if row["source"].startswith("Iso") and row["method"] == "ta"]
    assert [(row["Avg"], row["family"]) for row in iso] == [(ta, "tall_masks")]
    assert {row["family"] for row in published("vitb32", suite)} - {""} == {"FusionBench", "tall_masks"}


def test_no_average_of_other_tasks_is_quoted():
    lines = published_lines("vitb32", "clip20", [], list(suite_tasks("clip20")))
    assert any("Avg" in line.values and "tall_masks' experts" in line.label for line in lines)
    assert not any("Avg" in line.values for line in published_lines("vitb32", "clip20", [], ["mnist", "dtd"]))


def test_figures_of_another_family_of_experts_are_quoted_without_a_difference(tmp_path):
    path = write_cache(tmp_path / "cache", {"mnist": 60, "dtd": 40})
    edit_manifest(path, lambda manifest: manifest["identity"].update(arch="vitb32", suite="clip8"))
    fit(FitConfig(path, SurgerySettings(steps=5)))
    families = {}
    for place in ("tanganke/clip-vit-base-patch32_", "my/experts_"):
        files = {task: {"source": f"{place}{task}"} for task in ("mnist", "dtd")}
        edit_manifest(path, lambda manifest, files=files: manifest.update(files=files))
        lines = report(path, with_published=True)[0].accuracy.lines
        quoted = {line.label for line in lines if line.kind == PUBLISHED}
        families[place] = [line.method for line in lines if line.kind == DIFFERENCE].count("ta"), quoted
    (known, quoted), (unknown, same) = families.values()
    assert quoted == same
    of_ta = [label for label in quoted if label.startswith("ta [") and "tall_masks" not in label]
    assert (known, unknown) == (2, len(of_ta)) == (2, 3)


def test_published_figures_say_what_was_chosen_on_labels_and_how_ties_counts():
    labels = [line.label for line in published_lines("vitb32", "clip8", [], list(suite_tasks("clip8")))]
    assert "iso-c [published: Iso-C/CTS 2025 Tab.4; task-vectors' experts; scale chosen on labels]" in labels
    assert not any(label.startswith("ties [") for label in labels)  # their 20 % are of whole checkpoints
    assert any(label.startswith("ties (counted=checkpoint) [published: Surgery") for label in labels)


def test_published_figures_are_marked_and_compared_with_the_same_method(tmp_path, run):
    path = write_cache(tmp_path / "cache", {"mnist": 60, "dtd": 40})
    edit_manifest(path, lambda manifest: manifest["identity"].update(arch="vitb32", suite="clip8"))
    for settings in (SurgerySettings(), SurgerySettings(rank=4), SurgerySettings(loss="mse"), RidgeSettings()):
        fit(FitConfig(path, settings))
    fit(FitConfig(path, SurgerySettings(rank=4), holdout=0.5))
    transductive, holdout = report(path, with_published=True)
    quoted = [line for line in transductive.accuracy.lines if line.kind == PUBLISHED]
    assert len(quoted) == len([row for row in published("vitb32", "clip8") if row["MNIST"] or row["DTD"]])
    assert all("[published: " in line.label for line in quoted)
    assert not any(transductive.accuracy.is_best(line, "mnist") for line in quoted)
    differences = {line.method: line for line in transductive.accuracy.lines if line.kind == DIFFERENCE}
    assert {"ta", "individual", "pretrained", "ta+surgery(r=16)", "ta+surgery(r=4)"} == set(differences)
    (measured,) = [line for line in transductive.accuracy.lines if line.label == "+ Surgery (r=4, 1000 steps)"]
    assert differences["ta+surgery(r=4)"].values["dtd"] == pytest.approx(measured.values["dtd"].mean - 60.0)
    assert "Avg" not in differences["ta"].values  # the published average is over eight tasks, ours over two
    assert "Avg" not in quoted[0].values
    assert not any(line.method.startswith("ta+") for line in holdout.accuracy.lines if line.kind == DIFFERENCE)
    out = run("report", "--cache", path, "--published", "--format", "markdown")[1]
    assert "[published: Surgery ICML2024 Tab.6; task-vectors' experts]" in out


def test_a_share_of_the_data_and_an_online_fit_have_their_published_names(small_cache):
    (row, _) = fit(FitConfig(small_cache.path, SurgerySettings(steps=1))).rows
    online = row.settings | {"steps": 1, "batch_size": 1}
    row = replace(row, settings=online, protocol="transductive, online, fraction 0.1")
    assert published_name("lw-adamerging", row) == "lw-adamerging+surgery(r=16;online 10%)"
    share = replace(row, settings=asdict(SurgerySettings()), protocol="transductive, fraction 0.05")
    assert published_name("lw-adamerging", share) == "lw-adamerging+surgery(r=16;5% data)"
    known = {r["method"] for r in published("vitb32", "clip8")}
    assert {"lw-adamerging+surgery(r=16;online 10%)", "lw-adamerging+surgery(r=16;5% data)"} <= known
    assert published_name("ta", replace(share, settings=online)) == ""
    assert published_name("ta", replace(share, protocol="train")) == ""
    assert published_name("ta", replace(share, shared=True)) == ""


def test_no_published_figures_is_said(run, small_cache):
    fit(FitConfig(small_cache.path, ProbSettings(hidden=8, steps=60)))
    status, out, err = run("report", "--cache", small_cache.path, "--published")
    assert (status, "Accuracy" in out, err) == (0, True, "no figures were published for mini on mini\n")
