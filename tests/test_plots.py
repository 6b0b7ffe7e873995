"""The plots show the numbers of a history."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from definition import image, net, train_steps

import mapsurgery

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def tracker() -> mapsurgery.Tracker:
    """A short run with three records of four layers."""
    model = mapsurgery.patch(net(), "*", rank=2)
    tracker = mapsurgery.track(model, every=2)
    for _ in range(5):
        tracker.update()
        train_steps(model, image(), steps=1)
    return tracker


def test_the_heat_map_holds_the_measure_layers_by_steps(tracker: mapsurgery.Tracker, tmp_path: Path) -> None:
    figure = mapsurgery.plots.heat_map(tracker, "change", tmp_path / "change.png")
    panel, bar = figure.axes
    (picture,) = panel.images
    expected = tracker.history.values["change"].T
    assert torch.as_tensor(picture.get_array()).equal(expected)
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["stem", "body.0", "body.2", "head"]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["0", "2", "4"]
    assert bar.get_ylabel() == "change" and panel.get_xlabel() == "step"
    assert (tmp_path / "change.png").read_bytes().startswith(b"\x89PNG")


def test_a_measure_with_a_sign_has_its_zero_in_the_middle_of_the_colours(tracker: mapsurgery.Tracker) -> None:
    assert (tracker.history.values["cosine"] < 0).any()
    (picture,) = mapsurgery.plots.heat_map(tracker, "cosine").axes[0].images
    low, high = picture.get_clim()
    assert low == -high and high == tracker.history.values["cosine"].abs().max()


def test_magnitude_over_direction_has_a_dot_for_each_layer_and_step(tracker: mapsurgery.Tracker) -> None:
    values = tracker.history.values
    panel = mapsurgery.plots.magnitude_direction(tracker).axes[0]
    (dots,) = panel.collections
    expected = torch.stack([values["direction_change"].flatten(), values["magnitude_change"].flatten()], dim=1)
    assert torch.as_tensor(dots.get_offsets().data).equal(expected)
    assert dots.get_array().tolist() == [0] * 4 + [2] * 4 + [4] * 4
    assert len(panel.lines) == 4
    r = torch.corrcoef(torch.stack([values["direction_change"][-1], values["magnitude_change"][-1]]))[0, 1]
    assert panel.get_title() == f"4 layers, correlation at the last step {r:+.2f}"


def test_a_loaded_history_is_plotted_for_some_layers(tracker: mapsurgery.Tracker, tmp_path: Path) -> None:
    tracker.save(tmp_path / "run")
    history = mapsurgery.History.load(tmp_path / "run")
    panel = mapsurgery.plots.heat_map(history, "beta", layers=["body"]).axes[0]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["body.0", "body.2"]
    assert torch.as_tensor(panel.images[0].get_array()).equal(history.values["beta"][:, 1:3].T)
    assert mapsurgery.plots.magnitude_direction(history, layers="body").axes[0].get_title() == "2 layers"


def test_many_layers_and_steps_have_readable_ticks() -> None:
    layers = tuple(f"layer.{i}" for i in range(100))
    history = mapsurgery.History(torch.arange(50), layers, {"alpha": torch.rand(50, 100, dtype=torch.float64)})
    panel = mapsurgery.plots.heat_map(history, "alpha").axes[0]
    assert len(panel.get_yticks()) <= 60 and len(panel.get_xticks()) <= 10
    shown = [int(tick) for tick in panel.get_yticks()]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == [layers[i] for i in shown]


def test_what_cannot_be_plotted_is_named(tracker: mapsurgery.Tracker) -> None:
    with pytest.raises(ValueError, match="'gamma' was not recorded; there are: weight_norm, alpha"):
        mapsurgery.plots.heat_map(tracker, "gamma")
    with pytest.raises(ValueError, match="'bodi' matches no recorded layer; the nearest: .*body.0"):
        mapsurgery.plots.heat_map(tracker, "alpha", layers="bodi")
    model = mapsurgery.patch(net(), "body", rank=2)
    with pytest.raises(ValueError, match="nothing was recorded"):
        mapsurgery.plots.heat_map(mapsurgery.track(model), "alpha")
    with pytest.raises(ValueError, match="'magnitude_change' was not recorded"):
        mapsurgery.plots.magnitude_direction(mapsurgery.track(model, measures=["alpha"]))


def test_without_matplotlib_the_error_says_what_to_install(
    tracker: mapsurgery.Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib, or \"mapsurgery\[plots\]\""):
        mapsurgery.plots.heat_map(tracker, "alpha")
