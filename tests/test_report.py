"""The numbers of `report` are those of the materialised weights; its table is readable with and without rich."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from definition import (
    CASES,
    STARTS,
    Case,
    image,
    net,
    patched_case,
    start_name,
    to_generic_point,
    train_steps,
    weight_of,
)
from torch import nn

import mapsurgery
from mapsurgery._report import measurable_sites, measured
from mapsurgery.tables import render
from mapsurgery.updates import Matrix


def row_numbers(W: torch.Tensor, W_: torch.Tensor) -> dict[str, float]:
    """What W' - W does to the whole and to the rows, of the materialised weights."""
    along = ((W_ - W) * W).sum() / W.norm()
    scaling = (along / (W_ - W).norm()).square().item()
    lengths, before = W_.norm(dim=1), W.norm(dim=1)
    cosines = torch.nn.functional.cosine_similarity(W_, W, dim=1)
    return {
        "scaling": scaling,
        "direction": 1 - scaling,
        "magnitude_change": ((lengths - before).abs().mean() / before.mean()).item(),
        "direction_change": (1 - cosines).mean().item(),
    }


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("init", STARTS, ids=start_name)
def test_the_measures_are_those_of_the_materialised_weights(case: Case, init: mapsurgery.Init) -> None:
    _, adapted, _ = patched_case(case, init=init, dtype=torch.float64)
    a = adapted.adapter
    W, W_ = adapted.get_parameter("weight").detach(), weight_of(adapted)
    BA = (a.B @ a.A).detach()
    matrix = W.t() if case.name == "transformers_conv1d" else W.flatten(1)
    found = mapsurgery.report(adapted).layers[""]
    change = W_.t() if case.name == "transformers_conv1d" else W_.flatten(1)
    share = torch.linalg.svdvals(BA)
    share = share[: a.A.shape[0]] / share.sum()
    expected = {
        "rank": a.A.shape[0],
        "weight_norm": W.norm().item(),
        "alpha": 0.9,
        "beta": 0.4,
        "update_norm": ((change - 0.9 * matrix).norm() / W.norm()).item(),
        "change": ((W_ - W).norm() / W.norm()).item(),
        "cosine": ((matrix * BA).sum() / W.norm() / BA.norm()).item(),
        "effective_rank": torch.exp(-(share * share.log()).sum()).item(),
    } | row_numbers(matrix, change)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(-1.0, 0.0), (-1.0, 1e-9), (-0.01, 0.1), (0.0, 0.0)])
def test_a_base_that_is_turned_round_shows(alpha: float, beta: float) -> None:
    layer = to_generic_point(mapsurgery.patch(nn.Linear(6, 5).double(), "*", rank=2))
    layer.adapter.alpha.data.fill_(alpha - 1)
    layer.adapter.beta.data.fill_(beta)
    W, W_ = layer.get_parameter("weight").detach(), weight_of(layer)
    found = mapsurgery.report(layer).layers[""]
    if alpha:
        expected = row_numbers(W, W_)
        assert {name: found[name] for name in expected} == pytest.approx(expected)
    else:  # W' = 0 has no direction
        assert (found["change"], found["scaling"], found["direction_change"]) == pytest.approx((1, 1, 0))


def test_at_the_start_nothing_has_changed() -> None:
    values = mapsurgery.report(mapsurgery.patch(net(), "*", rank=2)).layers
    assert list(values) == ["stem", "body.0", "body.2", "head"]
    for layer in values.values():
        assert layer["change"] == layer["update_norm"] == layer["cosine"] == layer["effective_rank"] == 0
        assert layer["alpha"] == 1 and layer["beta"] == pytest.approx(0.1)


def test_training_shows_and_the_table_says_it() -> None:
    model = train_steps(mapsurgery.patch(net(), "body", rank=2), image())
    report = mapsurgery.report(model)
    assert all(0 < layer["change"] < 1 and 1 <= layer["effective_rank"] <= 2.001 for layer in report.layers.values())
    text = str(report)
    assert all(word in text for word in ("body.0", "body.2", "effective_rank", "cosine"))


def test_a_zero_weight_is_reported_in_absolute_units() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    to_generic_point(mapsurgery.patch(layer, "*", rank=2, init="zero"))
    values = mapsurgery.report(layer).layers[""]
    assert values["weight_norm"] == 0 and values["cosine"] == 0
    assert values["change"] == pytest.approx(0.4, rel=1e-4) == values["update_norm"]


def test_tables_read_the_same_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    text = render("title", ["name", "n"], [["a[b]", 1234], ["c", 5]], "footer")
    assert text.splitlines() == ["title", "name      n", "----  -----", "a[b]  1,234", "c         5", "footer"]
    assert "no rows" in render("no rows", ["name"], [])
    assert "body.0" in str(mapsurgery.plan(net(), "body", rank=2))


@pytest.mark.parametrize("method", ["map", "lora", "dora"])
@pytest.mark.parametrize("names", [("beta", "alpha"), ("alpha", "effective_rank"), ("cosine",), ("weight_norm",)])
def test_some_of_the_measures_are_those_of_the_whole_report(method: str, names: tuple[str, ...]) -> None:
    model = train_steps(mapsurgery.patch(net(), "*", rank=2, method=method), image())
    full = mapsurgery.report(model).layers
    sites = measurable_sites(model)
    for site, numbers in zip(sites, measured(sites, names).tolist(), strict=True):
        assert numbers == pytest.approx([full[site.path][name] for name in names], rel=1e-5)


def test_magnitudes_alone_read_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Matrix, weight: torch.Tensor) -> torch.Tensor:
        raise AssertionError("W was read")

    for method in ("map", "lora"):
        sites = measurable_sites(mapsurgery.patch(net(), "body", rank=2, method=method))
        with monkeypatch.context() as patched:
            patched.setattr(Matrix, "view", refuse)
            assert measured(sites, ("alpha", "beta")).shape == (2, 2)
            with pytest.raises(AssertionError, match="W was read"):
                measured(sites, ("change",))


@pytest.mark.parametrize("method", ["map", "lora", "dora"])
@pytest.mark.parametrize("update", ["lora", "adalora", "loha", "lokr", "vera", "flora", "pissa", "dense"])
def test_autocast_around_a_report_changes_no_number(update: str, method: str) -> None:
    model = train_steps(mapsurgery.patch(net(), "*", rank=2, method=method, update=update), image())
    expected = mapsurgery.report(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mapsurgery.report(model) == expected


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_layers_are_named_as_in_the_model_whatever_wraps_it(wrap: Callable) -> None:
    model = mapsurgery.patch(net(), "body", rank=2)
    assert list(mapsurgery.report(wrap(model)).layers) == ["body.0", "body.2"]
