"""What a pattern takes, and what the dry run says."""

from __future__ import annotations

import inspect
import json
import re
import string

import pytest
import torch
from definition import CASES, Net, Snapshot, image, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mapsurgery
from mapsurgery import Init
from mapsurgery.surgery.config import Config
from mapsurgery.surgery.globs import first_match, matches, nearest

# Globs ---------------------------------------------------------------------------------------------------------------


def _to_regex(pattern: str) -> str:
    """The documented semantics, written once more: * anything, ? one character, [...] a set, [!...] its complement."""
    out, i = "", 0
    while i < len(pattern):
        char = pattern[i]
        close = pattern.find("]", i + 2 + pattern[i + 1 : i + 2].count("!")) if char == "[" else -1
        if char == "*":
            out += ".*"
        elif char == "?":
            out += "."
        elif close > 0:
            body = pattern[i + 1 : close]
            negated, body = (body[0] == "!", body[1:] if body[0] == "!" else body)
            out += f"[{'^' if negated else ''}{re.escape(body)}]"
            i = close
        else:
            out += re.escape(char)
        i += 1
    return out


def _expected(path: str, pattern: str) -> bool:
    parts = path.split(".")
    return any(re.fullmatch(_to_regex(pattern), ".".join(parts[:end]), re.DOTALL) for end in range(1, len(parts) + 1))


_names = st.text("abAB01_", min_size=1, max_size=3)
_paths = st.lists(_names, min_size=1, max_size=4).map(".".join)
_sets = st.tuples(st.sampled_from(["[", "[!"]), st.text("abAB01", min_size=1, max_size=3)).map(
    lambda t: "".join(t) + "]"
)
_patterns = st.lists(st.one_of(st.sampled_from(["*", "?", ".", "a", "A", "b", "0", "_", "]"]), _sets), max_size=6)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(_paths, _patterns.map("".join))
def test_a_pattern_takes_what_the_definition_says(path: str, pattern: str) -> None:
    assert matches(path, pattern) == _expected(path, pattern)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_paths, st.data())
def test_a_path_with_one_part_made_wild_still_takes_it(path: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(path)))
    to = data.draw(st.integers(at, len(path)))
    assert matches(path, path[:at] + "*" + path[to:])
    assert matches(path + ".inner", path) and not matches(path, path + ".inner")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(_paths)
def test_matching_is_case_sensitive(path: str) -> None:
    swapped = path.swapcase()
    assert matches(path, swapped) == (path == swapped)


def test_literal_examples() -> None:
    taken = [
        ("blocks.0.attn.qkv", "*attn*"),
        ("blocks.0.attn.qkv", "blocks.0"),
        ("blocks.0.attn.qkv", "blocks.?.attn"),
        ("blocks.11.attn.qkv", "*.qkv"),
        ("blocks.3", "blocks.[0-5]"),
        ("", "*"),
    ]
    left = [
        ("blocks.10.attn", "blocks.?.attn"),
        ("blocks.0.attn", "*Attn*"),
        ("blocks.0.attn", "attn"),
        ("blocks.7", "blocks.[0-5]"),
        ("blocks.0", "blocks.0.attn"),
        ("ab", "a"),
    ]
    assert all(matches(*pair) for pair in taken) and not any(matches(*pair) for pair in left)


def test_the_first_pattern_that_takes_any_name_is_named() -> None:
    assert first_match(["a.b", "c.d"], ["x", "c", "a"]) == "c"
    assert first_match(["a.b"], []) is None


def test_nearest_names_come_from_whole_paths_and_last_names() -> None:
    paths = ["", "blocks.0.attn", "blocks.0.mlp", "head"]
    assert "blocks.0.attn" in nearest("*atn*", paths)
    assert nearest("hed", paths) == ["head"]
    assert nearest("zzzzzz", paths) == []


# Arguments that are refused ------------------------------------------------------------------------------------------

BAD = [
    ({"targets": []}, ValueError, "targets is empty"),
    ({"targets": [3]}, TypeError, "targets must be glob strings, got 3"),
    ({"targets": "bdy.*"}, ValueError, r"'bdy\.\*'.*body"),
    ({"targets": ["body", "haed"]}, ValueError, "'haed'.*head"),
    ({"targets": "BODY"}, ValueError, "'BODY'"),
    ({"targets": "norm"}, ValueError, "'norm'.*BatchNorm2d"),
    ({"targets": "body.1"}, ValueError, r"'body\.1'"),
    ({"targets": "head", "exclude": "head"}, ValueError, "'head'.*excluded"),
    ({"targets": "head", "train": "head"}, ValueError, "'head'.*train"),
    ({"exclude": "hed"}, ValueError, "exclude pattern 'hed'.*head"),
    ({"exclude": [None]}, TypeError, "exclude.*None"),
    ({"train": "hed"}, ValueError, "train pattern 'hed'.*head"),
    ({"train": 1.5}, TypeError, None),
    ({"rank": 0}, ValueError, "rank.*0"),
    ({"rank": -1}, ValueError, "rank.*-1"),
    ({"rank": 1.5}, TypeError, "rank.*1.5"),
    ({"rank": True}, TypeError, "rank.*True"),
    ({"rank": "8"}, TypeError, "rank.*'8'"),
    ({"rank": None}, TypeError, "rank.*None"),
    ({"rank_pattern": {"head": 0}}, ValueError, "rank_pattern.*head.*0"),
    ({"rank_pattern": {"head": False}}, TypeError, "rank_pattern.*head.*False"),
    ({"rank_pattern": {"stem": 2}, "targets": "head"}, ValueError, "rank_pattern pattern 'stem'"),
    ({"method": "lore"}, ValueError, "lore.*'map'"),
    ({"update": "lohra"}, ValueError, "lohra.*'lora'"),
    ({"init": "soft "}, ValueError, "'soft '.*'zero'"),
    ({"init": 3}, TypeError, "init.*3"),
    ({"dropout": 1.0}, ValueError, "dropout.*1.0"),
    ({"dropout": -0.1}, ValueError, "dropout.*-0.1"),
    ({"dropout": float("nan")}, ValueError, "dropout.*nan"),
    ({"dropout": True}, ValueError, "dropout.*True"),
    ({"dropout": "0.1"}, ValueError, "dropout.*0.1"),
    ({"dtype": torch.int8}, ValueError, "dtype.*int8"),
    ({"dtype": "float32"}, ValueError, "dtype.*float32"),
]


@pytest.mark.parametrize("operation", [mapsurgery.plan, mapsurgery.patch], ids=["plan", "patch"])
@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_a_bad_argument_is_named_and_changes_nothing(operation, arguments, error, message) -> None:
    model = net()
    model.stem.weight.requires_grad_(False)
    snapshot = Snapshot(model)
    with pytest.raises(error, match=message):
        operation(model, **{"targets": "*", **arguments})
    snapshot.assert_holds(model)


@pytest.mark.parametrize("operation", [mapsurgery.plan, mapsurgery.patch], ids=["plan", "patch"])
@pytest.mark.parametrize("argument", ["targets", "exclude", "train"])
def test_an_argument_that_is_no_pattern_is_named(operation, argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        operation(net(), **{"targets": "*", argument: 3})


@pytest.mark.parametrize("operation", [mapsurgery.plan, mapsurgery.patch], ids=["plan", "patch"])
def test_an_option_that_does_not_exist_is_named_with_the_nearest(operation) -> None:
    with pytest.raises(TypeError, match=f"{operation.__name__} has no option 'rnk'; the nearest that exist: rank"):
        operation(net(), "*", rnk=2)
    with pytest.raises(TypeError, match="no option 'qqqqq'; there are: targets, exclude, rank"):
        operation(net(), "*", qqqqq=2)
    with pytest.raises(TypeError, match="'targets'"):
        operation(net())


@pytest.mark.parametrize("operation", [mapsurgery.plan, mapsurgery.patch], ids=["plan", "patch"])
def test_the_signature_and_the_docstring_show_every_option(operation) -> None:
    shown = inspect.signature(operation).parameters
    assert ["model", *inspect.signature(Config).parameters] == list(shown)
    assert shown["rank"].default == 8 and shown["tied"].default == "share" and shown["method"].default == "map"
    documented = inspect.getdoc(mapsurgery.patch) or ""
    assert all(f"\n    {name}: " in documented for name in shown)


def test_options_come_back_from_what_a_file_holds() -> None:
    model = net()
    options = {"rank": 3, "rank_pattern": {"head": 2}, "init": Init(beta=0.3), "dtype": torch.float64, "train": "stem"}
    config = mapsurgery.plan(model, ["body", "head"], update="lokr", dropout=0.1, **options).config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_pattern_of_ranks_that_is_no_string_is_named() -> None:
    with pytest.raises(TypeError, match="rank_pattern"):
        mapsurgery.plan(net(), "*", rank_pattern={3: 2})


@pytest.mark.parametrize("model", [None, "model", [nn.Linear(2, 2)], nn.Linear], ids=str)
def test_what_is_no_model_is_refused(model) -> None:
    for operation in (mapsurgery.plan, mapsurgery.patch):
        with pytest.raises(TypeError, match="Module"):
            operation(model, "*")


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential.*no parameters"):
        mapsurgery.plan(nn.Sequential(nn.ReLU()), "*")


def test_an_integer_parameter_cannot_be_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_parameter("table", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False))
    with pytest.raises(ValueError, match="table.*int64"):
        mapsurgery.patch(model, "0", train="table")


def test_a_shared_module_that_cannot_be_adapted_gives_its_reason_under_every_name() -> None:
    model = nn.Module()
    model.first = nn.LayerNorm(4)
    model.second = model.first
    model.third = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="LayerNorm"):
        mapsurgery.plan(model, "second")


# The plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_touches_nothing_and_draws_no_random_numbers() -> None:
    model = net()
    snapshot, state = Snapshot(model), torch.get_rng_state()
    print(mapsurgery.plan(model, "*", train="head"))
    snapshot.assert_holds(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_targets_take_a_layer_or_what_contains_it() -> None:
    def names(*targets: str, **options) -> list[str]:
        return [layer.path for layer in mapsurgery.plan(net(), targets, **options).layers]

    assert names("body") == ["body.0", "body.2"]
    assert names("body.2") == ["body.2"]
    assert names("*") == ["stem", "body.0", "body.2", "head"]
    assert names("*", exclude="body") == ["stem", "head"]
    assert names("*", exclude=["*.0", "stem"]) == ["body.2", "head"]
    assert names("*", train="head*") == ["stem", "body.0", "body.2"]
    assert names(*iter(["head"])) == ["head"]


def test_the_plan_says_what_patch_does() -> None:
    options = {"rank": 5, "rank_pattern": {"body.*": 2, "body.0": 7}, "train": ["head", "norm.bias"]}
    model = net()
    plan = mapsurgery.plan(model, ["body", "stem"], **options)
    mapsurgery.patch(model, ["body", "stem"], **options)
    assert {layer.path: layer.rank for layer in plan.layers} == {"stem": 5, "body.0": 2, "body.2": 2}
    for layer in plan.layers:
        assert model.get_submodule(layer.path).adapter.A.shape[0] == layer.rank
        own = sum(p.numel() for p in model.get_submodule(layer.path).adapter.own_parameters().values())
        assert own == layer.trainable
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.model_parameters == sum(p.numel() for p in net().parameters())
    assert plan.trainable_share == plan.trainable_parameters / plan.model_parameters
    assert plan.trained == ("norm.bias", "head.weight", "head.bias")
    assert plan.counts == {"body": 2, "stem": 1}


def test_a_rank_beyond_the_layer_is_reduced_and_the_plan_says_so() -> None:
    plan = mapsurgery.plan(net(), "*", rank=10)
    assert {layer.path: layer.rank for layer in plan.layers} == {"stem": 8, "body.0": 8, "body.2": 8, "head": 4}
    text = plan.table(full=True)
    assert "rank 10 is more than the layer allows: 4" in text
    model = mapsurgery.patch(net(), "*", rank=10)
    assert model.head.adapter.A.shape[0] == 4
    assert not mapsurgery.verify(model, image()).failures


def test_the_table_names_layers_totals_and_reasons() -> None:
    model = net()
    nn.init.zeros_(model.head.weight)
    text = str(mapsurgery.plan(model, ["*"], rank=2, exclude="stem"))
    for part in ("body.0", "body.2", "head", "BatchNorm2d is not an adaptable layer type", "excluded by 'stem'"):
        assert part in text, part
    assert "zero weight: no base term, beta absolute" in text
    assert re.search(r"trainable: \d+ \(\d+ in adapters\)", text)


def test_similar_layers_share_a_row_and_full_gives_each_its_own() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    plan = mapsurgery.plan(model, "*", rank=2)
    assert "{0..11}" in str(plan)
    full = plan.table(full=True)
    assert "{0..11}" not in full
    assert len([line for line in full.splitlines() if "Linear" in line]) == 12


def test_one_module_under_two_names_is_one_layer_reported_under_both() -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(4, 4), nn.Linear(4, 4)
    model.alias = model.first
    plan = mapsurgery.plan(model, "alias", rank=2)
    assert [layer.paths for layer in plan.layers] == [("first", "alias")]
    assert "first = alias" in str(plan)
    mapsurgery.patch(model, "*", rank=2)
    assert model.alias is model.first and len(list(model.first.adapter.named_parameters())) == 4


def test_a_tied_weight_is_noted() -> None:
    model = nn.Module()
    model.embed, model.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    model.out.weight = model.embed.weight
    assert "tied with embed.weight" in str(mapsurgery.plan(model, "out", rank=2))


def test_markup_in_names_is_printed_as_it_is() -> None:
    model = nn.Module()
    model.add_module("[bold]layer[0]", nn.Linear(4, 4))
    assert "[bold]layer[0]" in str(mapsurgery.plan(model, "*", rank=2))


def _parametrized() -> nn.Module:
    return nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))


def _weight_norm() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


def _integer() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def _float8() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def _quantised() -> nn.Module:
    class Packed(nn.Parameter):
        pass

    layer = nn.Linear(4, 4)
    layer.weight = Packed(torch.ones(4, 4))
    return layer


def _named_adapter() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.adapter = nn.Identity()
    return layer


UNADAPTABLE = {
    "lazy": (lambda: nn.LazyLinear(4), "lazy"),
    "int8": (_integer, "int8"),
    "float8": (_float8, "float8"),
    "quantised": (_quantised, "Packed"),
    "empty_rows": (lambda: nn.Linear(4, 0), "empty"),
    "empty_columns": (lambda: nn.Linear(0, 4), "empty"),
    "attribute_taken": (_named_adapter, "adapter"),
    "renormalised_embedding": (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
    "norm": (lambda: nn.LayerNorm(4), "LayerNorm"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNADAPTABLE)
def test_a_layer_that_cannot_be_adapted_is_skipped_with_the_reason(kind: str) -> None:
    make, reason = UNADAPTABLE[kind]
    model = nn.ModuleDict({"odd": make(), "plain": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=f"'odd'.*{reason}"):
        mapsurgery.patch(model, "odd")
    assert type(model["plain"]) is nn.Linear
    plan = mapsurgery.plan(model, "*", rank=2)
    assert any(skip.path == "odd" and reason in skip.reason for skip in plan.skipped)
    assert reason in str(plan)
    mapsurgery.patch(model, "*", rank=2)
    assert isinstance(model["plain"], mapsurgery.AdaptedLayer)
    assert not isinstance(model["odd"], mapsurgery.AdaptedLayer)


def test_a_lazy_layer_can_be_adapted_after_its_first_forward() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyConv1d(3, 1))
    model(torch.randn(2, 4, 6))
    assert len(mapsurgery.plan(model, "*", rank=2).layers) == 2


def test_every_case_of_the_layer_tests_can_be_planned_inside_a_model() -> None:
    model = nn.ModuleDict({case.name: case.make() for case in CASES})
    plan = mapsurgery.plan(model, "*", rank=3)
    assert [layer.path for layer in plan.layers] == [case.name for case in CASES]
    assert all(c in string.printable or c in " ─" for c in str(plan))


def test_net_is_what_these_tests_think_it_is() -> None:
    assert [name for name, _ in Net().named_children()] == ["stem", "norm", "body", "head"]
