"""Scales of features in training: exact, undone by the head, chosen without labels."""

import json

import pytest
import torch

from probsurgery.pipeline.config import FitConfig, ProbSettings, SweepConfig, head_settings
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.fitting.scale import TARGET, scale_for
from probsurgery.pipeline.fitting.sweep import sweep
from probsurgery.pipeline.heads.head import load_head, recorded
from probsurgery.pipeline.heads.kinds import prob_distribution
from probsurgery.pipeline.heads.uncertainty import measure
from probsurgery.pipeline.store.cache import Cache
from support import refused, write_cache

SETTINGS = {"hidden": 4, "steps": 60}


def cache_of(path, factor=1.0, kinds=("merged", "expert", "pretrained"), **other):
    """The same features in another unit."""

    def change(task, arrays):
        return arrays | {kind: arrays[kind] * factor for kind in kinds}

    return write_cache(path, {"a": 40, "b": 30}, change=change, **other)


def fitted(cache, name="head", **settings):
    return fit(FitConfig(cache, ProbSettings(**SETTINGS | settings), name=name, device="cpu"))


@pytest.fixture
def caches(tmp_path):
    """Features, and the same an eighth as large."""
    return cache_of(tmp_path / "large"), cache_of(tmp_path / "small", 1 / 8)


def test_a_scale_is_that_of_the_features_and_undone_by_the_head(caches):
    large, small = (Cache(path) for path in caches)
    plain, scaled = fitted(large.path).head, fitted(small.path, feature_scale=8).head
    assert all(torch.equal(plain.params[name], scaled.params[name]) for name in plain.params)
    unscaled = fitted(small.path, "unscaled").head
    for task in ("a", "b"):
        z, expert = (small.features(task, kind) for kind in ("merged", "expert"))
        assert torch.allclose(8 * scaled(z, task), plain(large.features(task), task), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(scaled(z, task), unscaled(z, task), rtol=1e-2)
        of_large = prob_distribution(plain.params_of(task), large.features(task)[None])[1]
        in_own_units = prob_distribution(scaled.params_of(task), z[None], 8.0)[1]
        assert torch.allclose((in_own_units / 2).exp() * 8, (of_large / 2).exp(), rtol=1e-5)
        measured = measure(scaled.params_of(task), z, expert, scale=8.0)
        expected = measure(plain.params_of(task), *(large.features(task, kind) for kind in ("merged", "expert")))
        assert measured.within == pytest.approx(expected.within)
        assert 8 * measured.bins[0][0] == pytest.approx(expected.bins[0][0], rel=1e-4)


def test_auto_is_a_power_of_two_by_the_experts_features_alone(caches, tmp_path):
    large, small = caches
    scale = fitted(large, feature_scale=0).config.head.feature_scale
    assert fitted(small, feature_scale=0).config.head.feature_scale == 8 * scale
    values = torch.cat([Cache(large).features(task, "expert") for task in ("a", "b")])
    assert 2**-0.5 <= scale * values.square().mean().sqrt() / TARGET <= 2**0.5
    without_labels = write_cache(tmp_path / "bare", {"a": 40, "b": 30}, change=lambda task, arrays: {
        kind: values for kind, values in arrays.items() if kind in ("merged", "expert")
    })  # fmt: skip
    assert fitted(without_labels, feature_scale=0).config.head.feature_scale == scale
    other_merged = cache_of(tmp_path / "other", 100, kinds=("merged",))
    assert fitted(other_merged, feature_scale=0).config.head.feature_scale == scale
    assert scale_for(0.0) == 1
    assert scale_for(0.3) == 8


def test_it_is_recorded_unless_it_is_1(caches):
    large, small = caches
    old = fitted(large, "old")
    assert "feature_scale" not in old.rows[0].settings
    assert "feature_scale" not in json.loads((old.path / "head.json").read_text())["settings"]
    assert load_head(old.path).settings.feature_scale == 1
    assert recorded(ProbSettings()) == {
        "steps": 5000, "batch_size": 16, "lr": 0.001, "loss": "l1", "hidden": 128, "kl_weight": 1e-4, "samples": 1
    }  # fmt: skip
    scaled = fit(FitConfig(small, ProbSettings(**SETTINGS, feature_scale=0), device="cpu"))
    chosen = scaled.config.head.feature_scale
    assert scaled.path.name == f"prob-h4-steps60-scale{chosen:g}"
    assert scaled.rows[0].settings["feature_scale"] == chosen
    assert load_head(scaled.path).settings.feature_scale == chosen
    assert fit(FitConfig(small, ProbSettings(**SETTINGS, feature_scale=chosen), device="cpu")).repeated
    about = json.loads((scaled.path / "head.json").read_text())
    about["settings"]["feature_scale"] = 0
    (scaled.path / "head.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="is damaged .*feature scale is 0"):
        load_head(scaled.path)


def test_a_sweep_takes_auto_among_others(caches):
    values = {"hidden": (4,), "steps": (40,), "feature_scale": (1, 0, 2), "kl_weight": (0, 0.1)}
    result = sweep(SweepConfig(caches[1], ("prob", "surgery"), values | {"rank": (2,)}, device="cpu"))
    chosen = result.varied["feature_scale"][1]
    assert chosen > 2
    scales = [line.setting.get("feature_scale") for line in result.lines if line.setting["head"] == "prob"]
    assert scales == [1, 1, chosen, chosen, 2, 2]


def test_by_the_command_line(caches, run):
    small, fast = caches[1], ("--hidden", 4, "--steps", 20, "--device", "cpu")
    status, _, err = run("fit", "--cache", small, *fast)
    assert (status, "far below the noise, which starts at 1; --feature-scale auto" in err) == (0, True), err
    status, out, err = run("fit", "--cache", small, *fast, "--feature-scale", "auto")
    assert (status, "prob-h4-steps20-scale" in out, "noise" in err) == (0, True, False), err
    assert "noise" not in run("fit", "--cache", caches[0], *fast)[2]
    assert run("sweep", "--cache", small, *fast, "--feature-scale", "1,auto")[0] == 0
    assert "feature-scale=" in run("report", "--cache", small)[1]
    fit_it = ("fit", "--cache", small, "--feature-scale")
    for given, words in [
        ("0", "not a positive number; write auto"),
        ("-1", "--feature-scale is -1"),
        ("big", "a number"),
    ]:
        refused(run(*fit_it, given), words)
    refused(run(*fit_it, "2", "--head", "surgery"), "--feature-scale is not a setting of surgery heads")
    with pytest.raises(InputError, match="must be from 1e-06 to 1e"):
        head_settings("prob", feature_scale=1e9)
