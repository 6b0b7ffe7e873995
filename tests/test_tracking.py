"""`track` collects what `report` says, when it should, and keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from definition import image, net, train_steps
from torch import nn

import mapsurgery
from mapsurgery import MEASURES, _track


def _model(**options: object) -> nn.Module:
    return mapsurgery.patch(net(), "*", rank=2, **options)


def _flat(model: nn.Module) -> dict[str, float]:
    """The numbers of a report, but the rank, which is no measure."""
    return {name: value for name, value in mapsurgery.report(model).to_dict().items() if not name.endswith("/rank")}


@pytest.mark.parametrize("method", ["map", "lora", "dora"])
def test_records_are_the_reports_of_their_steps(method: str) -> None:
    model = _model(method=method)
    tracker = mapsurgery.track(model, every=2)
    reports = []
    for step in range(5):
        assert tracker.update(step) == (step % 2 == 0)
        if step % 2 == 0:
            reports.append(_flat(model))
            assert tracker.latest() == reports[-1]
        train_steps(model, image(), steps=1)
    history = tracker.history
    assert history.steps.tolist() == [0, 2, 4] and history.layers == ("stem", "body.0", "body.2", "head")
    assert list(history.values) == list(MEASURES)
    for measure, values in history.values.items():
        assert values.shape == (3, 4) and values.dtype == torch.float64
        expected = [[report[f"{path}/{measure}"] for path in history.layers] for report in reports]
        assert values.tolist() == expected
    assert [history.at(i) for i in range(3)] == reports
    table = json.loads(json.dumps(tracker.to_dict()))
    assert table["step"] == [0, 2, 4] and table["head/change"] == history.values["change"][:, 3].tolist()
    assert history.values["change"][0].max() == 0 < history.values["change"][1].min()


def test_steps_are_counted_where_none_is_given() -> None:
    tracker = mapsurgery.track(_model(), every=3)
    assert tracker.latest() == {} and tracker.history.steps.tolist() == []
    assert [tracker.update() for _ in range(7)] == [True, False, False, True, False, False, True]
    tracker.update(30)
    assert [tracker.update() for _ in range(3)] == [False, False, True]
    assert tracker.history.steps.tolist() == [0, 3, 6, 30, 33]


def test_a_step_is_recorded_once_and_none_before_it() -> None:
    tracker = mapsurgery.track(_model(), every=10)
    assert tracker.update(20) and not tracker.update(20)  # as in gradient accumulation
    with pytest.raises(ValueError, match="step 10 comes after step 20"):
        tracker.update(10)
    with pytest.raises(TypeError, match="float"):
        tracker.update(30.0)  # type: ignore[arg-type]
    assert tracker.history.steps.tolist() == [20]


def test_nothing_is_computed_between_records_and_nothing_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    measured, fetch = _track.measured, _track.Tracker._fetch
    monkeypatch.setattr(_track, "measured", lambda *args: calls.append("measured") or measured(*args))
    monkeypatch.setattr(_track.Tracker, "_fetch", lambda self: calls.append("fetch") or fetch(self))
    monkeypatch.setattr(_track, "_MOST_ON_DEVICE", 3)
    tracker = mapsurgery.track(_model(), every=4)
    for _ in range(8):
        tracker.update()
    assert calls == ["measured"] * 2
    tracker.update()
    assert calls == ["measured"] * 3 + ["fetch"]
    assert tracker.history.values["alpha"].shape == (3, 4)


def test_magnitudes_can_be_collected_at_every_step_beside_the_rest() -> None:
    model = _model(method="map")
    cheap, full = mapsurgery.track(model, every=1, measures=["beta", "alpha"]), mapsurgery.track(model, every=2)
    for _ in range(3):
        cheap.update()
        full.update()
        train_steps(model, image(), steps=1)
    assert list(cheap.history.values) == ["beta", "alpha"]
    for name in ("alpha", "beta"):
        assert cheap.history.values[name][::2].equal(full.history.values[name])
    assert set(cheap.latest()) == {f"{path}/{name}" for path in cheap.layers for name in ("alpha", "beta")}


def test_a_history_is_saved_loaded_and_continued(tmp_path: Path) -> None:
    model = _model()
    whole, first = (mapsurgery.track(model, every=2, measures=["cosine", "alpha"]) for _ in range(2))
    for tracker in (whole, first):
        tracker.update(0)
    train_steps(model, image(), steps=1)
    for tracker in (whole, first):
        tracker.update(2)
    first.save(tmp_path / "run.safetensors")
    loaded = mapsurgery.History.load(tmp_path / "run.safetensors")
    assert loaded.layers == whole.layers and loaded.at(-1) == whole.latest()
    second = mapsurgery.track(model, every=2, measures=["alpha", "cosine"], history=loaded)
    train_steps(model, image(), steps=1)
    assert not second.update() and second.update()  # steps 3 and 4
    whole.update(4)
    assert second.history.steps.tolist() == [0, 2, 4]
    for name, values in whole.history.values.items():
        assert second.history.values[name].equal(values)


def test_another_file_or_history_is_refused(tmp_path: Path) -> None:
    model = _model()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mapsurgery.History.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no safetensors file")
    with pytest.raises(ValueError, match="text is not a complete safetensors file"):
        mapsurgery.History.load(tmp_path / "text")
    mapsurgery.save(model, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="adapter.safetensors .* not one that a history"):
        mapsurgery.History.load(tmp_path / "adapter.safetensors")
    history = mapsurgery.track(model, every=1).history
    with pytest.raises(ValueError, match="another model.*body.0"):
        mapsurgery.track(mapsurgery.patch(net(), "head", rank=2), every=1, history=history)
    with pytest.raises(ValueError, match="measures are .'alpha',"):
        mapsurgery.track(model, every=1, measures=["alpha"], history=history)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 2.0}, TypeError, "every must be an int, got 2.0"),
        ({"every": True}, TypeError, "every.*True"),
        ({"measures": "alpha"}, TypeError, "'alpha'"),
        ({"measures": ["alpha", "gamma"]}, ValueError, "'gamma'.*unknown; there are: weight_norm"),
        ({"measures": []}, ValueError, "unknown"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mapsurgery.track(_model(), **options)


@pytest.mark.parametrize("undo", [mapsurgery.merge, mapsurgery.unpatch])
def test_a_layer_that_is_no_longer_adapted_is_named(undo: object) -> None:
    model = _model()
    tracker = mapsurgery.track(model, every=1)
    tracker.update()
    undo(model)  # type: ignore[operator]
    with pytest.raises(ValueError, match="stem is no longer adapted"):
        tracker.update()
    assert len(tracker.history.steps) == 1  # what was recorded stays
    with pytest.raises(ValueError, match="patch first"):
        mapsurgery.track(model, every=1)


def test_tracking_goes_on_after_unmerge() -> None:
    model = train_steps(_model(), image())
    tracker = mapsurgery.track(model, every=1)
    tracker.update()
    mapsurgery.unmerge(mapsurgery.merge(model, keep_base=True))
    tracker.update()
    first, second = (tracker.history.at(i) for i in range(2))
    assert first == second


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_is_tracked_under_the_names_of_the_model() -> None:
    model = _model()
    compiled = torch.compile(model, backend="aot_eager")
    tracker = mapsurgery.track(compiled, every=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            tracker.update()
            train_steps(compiled, image(), steps=1)
    tracker.update()
    assert tracker.latest() == _flat(model)
    assert tracker.latest()["body.0/change"] > 0


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))
        self.embed = nn.Embedding(6, 5)
        self.out = nn.Linear(5, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.einsum("td,emd->tm", self.embed(ids), self.up) + self.out(self.embed(ids))


def test_a_tied_weight_is_one_layer_and_a_stack_one_mean() -> None:
    model = mapsurgery.patch(_Experts(), "embed", rank=2, parameters="up")
    tracker = mapsurgery.track(model, every=1)
    tracker.update()
    model(torch.tensor([1, 2])).square().sum().backward()
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    tracker.update()
    assert set(tracker.layers) == {"up", "embed"}
    assert tracker.latest() == _flat(model)
    assert tracker.latest()["up/alpha"] == pytest.approx(1 + model.adapter_up.alpha.mean().item())


def test_tracking_leaves_training_as_it_is() -> None:
    plain, tracked = (_model(dropout=0.1) for _ in range(2))
    tracked.load_state_dict(plain.state_dict())
    tracker = mapsurgery.track(tracked, every=1)
    torch.manual_seed(0)
    train_steps(plain, image(), steps=3)
    torch.manual_seed(0)
    parameters = [p for p in tracked.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    tracked.train()
    for _ in range(3):
        optimizer.zero_grad()
        tracked(image()).square().mean().backward()
        optimizer.step()
        tracker.update()
    assert all(a.equal(b) for a, b in zip(plain.parameters(), tracked.parameters(), strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_record_makes_the_host_wait_for_nothing() -> None:
    tracker = mapsurgery.track(
        _model().cuda(), every=1, measures=[name for name in MEASURES if name != "effective_rank"]
    )
    tracker.update()  # whatever is set up once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tracker.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(tracker.history.steps) == 2
