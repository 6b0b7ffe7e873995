"""An adapter's own base is taken, as it is, cast or quantised; another one is refused, however alike it is."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from definition import to_generic_point
from torch import nn

import mapsurgery
from mapsurgery import ops
from mapsurgery.ops import operators

bitsandbytes = pytest.importorskip("bitsandbytes")


class Scaled(nn.Linear):
    """The weights of an nn.Linear, and another function of them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 0.5


class Renamed(nn.Linear):
    """What nn.Linear computes, under another name."""


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(64, 64)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(3, 24, 16))
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 5)
        self.register_buffer("table", torch.randn(70))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.attention(x)))


def _base() -> Base:
    torch.manual_seed(0)
    base = Base().eval()
    base.norm.running_mean.normal_()
    return base


def _adapted(base: nn.Module, **options: object) -> nn.Module:
    options = {"parameters": ["experts"], "rank": 2} | options
    return to_generic_point(mapsurgery.patch(base, ["attention", "conv"], **options))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "adapter.safetensors"
    mapsurgery.save(_adapted(_base()), path)
    return path


@torch.no_grad()
def _write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor.copy_(value)


def _swap_halves(base: Base) -> None:
    """As Meta's and HF's layouts of q and k differ."""
    w = base.attention.weight
    _write(w, w.detach().reshape(4, 2, 8, 64).transpose(1, 2).reshape(64, 64).clone())


def _two_rows(base: Base) -> None:
    w = base.attention.weight
    _write(w, w.detach()[[1, 0, *range(2, 64)]].clone())


def _rotated(base: Base) -> None:
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    _write(base.attention.weight, base.attention.weight.detach() @ rotation)


def _transposed_conv(base: Base) -> None:
    other = nn.ConvTranspose2d(16, 16, 3, padding=1)
    other.weight, other.bias = base.conv.weight, base.conv.bias
    base.conv = other


def _strided(base: Base) -> None:
    base.conv.stride = (2, 2)


def _other_forward(base: Base) -> None:
    base.attention.__class__ = Scaled


OTHERS: dict[str, tuple[Callable[[Base], object], str]] = {
    "rows of heads in another order": (_swap_halves, "attention has another weight of the same norm"),
    "two rows swapped": (_two_rows, "attention has another weight of the same norm"),
    "columns in another order": (
        lambda b: _write(b.attention.weight, b.attention.weight.detach().flip(1)),
        "attention",
    ),
    "transposed": (lambda b: _write(b.attention.weight, b.attention.weight.detach().T.clone()), "attention"),
    "negated": (lambda b: _write(b.attention.weight, -b.attention.weight), "attention"),
    "rotated": (_rotated, "attention"),
    "a kernel turned round": (lambda b: _write(b.conv.weight, b.conv.weight.detach().flip(2, 3)), "conv"),
    "two experts swapped": (
        lambda b: _write(b.experts, b.experts.detach()[[1, 0, 2]].clone()),
        r"experts \(matrix 0\)",
    ),
    "another bias": (lambda b: _write(b.attention.bias, torch.randn(64)), "attention.bias, which is not adapted"),
    "another head": (lambda b: _write(b.head.weight, torch.randn(5, 64)), "head.weight"),
    "other statistics": (lambda b: b.norm.running_var.mul_(1.01), "norm.running_var"),
    "another table": (lambda b: _write(b.table, b.table.flip(0)), "table"),
    "a head of another width": (lambda b: setattr(b, "head", nn.Linear(32, 5)), "head.weight"),
    "no head": (lambda b: delattr(b, "head"), "head.bias is missing"),
    "a head without its bias": (lambda b: setattr(b.head, "bias", None), "head.bias is missing"),
    "a norm without its scale": (lambda b: setattr(b.norm, "weight", None), "norm.weight is missing"),
    "another forward": (_other_forward, r"attention is a Scaled.*, the adapter was trained on a Linear"),
    "a transposed convolution": (_transposed_conv, "conv is a ConvTranspose2d"),
    "another stride": (_strided, "stride"),
    "trained a little": (
        lambda b: _write(b.attention.weight, b.attention.weight + 1e-4 * torch.randn(64, 64)),
        "attention",
    ),
}


@pytest.mark.parametrize("kind", [*OTHERS])
@pytest.mark.parametrize("by", ["load", "load_adapter_state_dict", "restore"])
def test_another_base_is_refused(path: Path, kind: str, by: str) -> None:
    change, message = OTHERS[kind]
    base = _base()
    change(base)
    if by == "load":
        call = lambda: mapsurgery.load(base, path)  # noqa: E731
    else:
        model = _adapted(base)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        state = mapsurgery.adapter_state_dict(_adapted(_base()))
        call = (  # noqa: E731
            (lambda: mapsurgery.load_adapter_state_dict(model, state))
            if by == "load_adapter_state_dict"
            else (lambda: mapsurgery._adapter_file.restore(model, path))
        )
        if message.endswith("is missing"):
            return  # it is the model's business what it lost since it was patched
    with pytest.raises(ValueError, match=f"another base: .*{message}"):
        call()
    if by == "load":
        assert not any(isinstance(module, mapsurgery.AdaptedLayer) for module in base.modules())
    else:
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_who_knows_loads_onto_another_base(path: Path) -> None:
    expected = mapsurgery.adapter_state_dict(_adapted(_base()))

    def other() -> Base:
        base = _base()
        _write(base.attention.weight, -base.attention.weight)
        return base

    with pytest.warns(UserWarning, match="another base: attention") as caught:
        warned = mapsurgery.load(other(), path, base="warn")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = mapsurgery.load(other(), path, base="ignore")
        mapsurgery.load(_base(), path, base="warn")
        mapsurgery.load_adapter_state_dict(_adapted(other()), expected, base="ignore")
    with pytest.warns(UserWarning, match="another base: attention"):
        mapsurgery.load_adapter_state_dict(_adapted(other()), expected, base="warn")
    for model in (warned, ignored):
        found = mapsurgery.adapter_state_dict(model)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match="'refuse', 'warn', 'ignore', got 'yes'"):
        mapsurgery.load(_base(), path, base="yes")


def _nothing(base: Base) -> Base:
    return base


def _subclass(base: Base) -> Base:
    base.attention.__class__ = Renamed
    return base


def _of_another_memory(base: Base) -> Base:
    return base.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "same",
    [_nothing, Base.double, Base.bfloat16, Base.half, _subclass, _of_another_memory],
    ids=lambda f: f.__name__,
)
def test_the_own_base_is_taken_however_it_is_stored(path: Path, same: Callable[[Base], Base]) -> None:
    mapsurgery.load(same(_base()), path)


@pytest.mark.parametrize("train", [["head"], ["*bias"], ["norm"]], ids=str)
def test_what_was_trained_needs_not_be_as_it_was(tmp_path: Path, train: list[str]) -> None:
    """A new head is another one in each process; the file holds what became of it."""
    model = _adapted(_base(), train=train)
    mapsurgery.save(model, tmp_path / "file")
    fresh = _base()
    for name, parameter in fresh.named_parameters():
        if name in mapsurgery.adapter_state_dict(model):
            _write(parameter, torch.randn_like(parameter))
    loaded = mapsurgery.load(fresh, tmp_path / "file")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def _quantised(kind: str, negated: bool = False) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(128, 64)
    with torch.no_grad():
        plain.weight.mul_(-1 if negated else 1)
    if kind == "plain":
        return nn.Sequential(plain)
    layer = {
        "int8": lambda: bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False),
        "nf4": lambda: bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4"),
        "fp4": lambda: bitsandbytes.nn.Linear4bit(128, 64, quant_type="fp4"),
    }[kind]()
    layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer).to("cpu")


@pytest.mark.parametrize(
    ("trained_on", "loaded_on"),
    [*itertools.product(["plain", "nf4", "int8"], repeat=2), ("plain", "fp4"), ("fp4", "fp4")],
)
def test_a_quantised_base_is_known_up_to_its_rounding(tmp_path: Path, trained_on: str, loaded_on: str) -> None:
    mapsurgery.save(to_generic_point(mapsurgery.patch(_quantised(trained_on), "0", rank=2)), tmp_path / "file")
    mapsurgery.load(_quantised(loaded_on), tmp_path / "file")
    with pytest.raises(ValueError, match=r"another base: 0 has"):
        mapsurgery.load(_quantised(loaded_on, negated=True), tmp_path / "file")


def test_a_model_that_was_loaded_and_saved_again_knows_its_base(tmp_path: Path, path: Path) -> None:
    mapsurgery.save(mapsurgery.load(_base().bfloat16(), path), tmp_path / "again")
    for base in (_base(), _base().bfloat16()):
        mapsurgery.load(base, tmp_path / "again")
    other = _base()
    _rotated(other)
    with pytest.raises(ValueError, match="attention"):
        mapsurgery.load(other, tmp_path / "again")


def test_a_base_that_was_exchanged_is_the_one_that_is_saved(tmp_path: Path) -> None:
    """By one of the same norm: the norm does not show it."""
    model, other = _adapted(_base()), _base()
    _rotated(other)
    model.load_state_dict(other.state_dict(), strict=False)
    mapsurgery.save(model, tmp_path / "file")
    mapsurgery.load(copy.deepcopy(other), tmp_path / "file")
    with pytest.raises(ValueError, match="attention"):
        mapsurgery.load(_base(), tmp_path / "file")


# Bases that are the own one, although not every number is -------------------------------------------------------------


def _round_trip(make: Callable[[], nn.Module], targets: str, tmp_path: Path, other: Callable[[], nn.Module]) -> None:
    mapsurgery.save(to_generic_point(mapsurgery.patch(make(), targets, rank=2)), tmp_path / "file")
    mapsurgery.load(other(), tmp_path / "file")


@pytest.mark.parametrize("size", [1e-6, 1e-8])
def test_numbers_that_float16_holds_as_subnormal_ones_are_the_same(tmp_path: Path, size: float) -> None:
    """Layer scales of ConvNeXt and CaiT start at 1e-6."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"0": nn.Linear(16, 16), "small": nn.Linear(16, 16)})
        model.scale = nn.Parameter(size * torch.randn(16))
        with torch.no_grad():
            model["small"].weight.mul_(size)
        return model

    _round_trip(make, "*", tmp_path, lambda: make().half())
    _round_trip(lambda: make().half(), "0", tmp_path, make)


def test_a_pooler_that_no_checkpoint_holds_is_not_compared(tmp_path: Path) -> None:
    """from_pretrained draws it anew in each process."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "checkpoint")

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return transformers.BertModel.from_pretrained(tmp_path / "checkpoint")

    _round_trip(lambda: make(1), "*query", tmp_path, lambda: make(2))


@pytest.mark.parametrize("rows", [(41, 41), (40, 41), (40, 64)], ids=str)
def test_a_token_that_was_added_changes_no_base(tmp_path: Path, rows: tuple[int, int]) -> None:
    def make(count: int, seed: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"embed": nn.Embedding(40, 16), "0": nn.Linear(16, 16)})
        torch.manual_seed(seed)
        new = torch.randn(count - 40, 16)
        model["embed"].weight = nn.Parameter(torch.cat([model["embed"].weight.detach(), new]))
        return model

    _round_trip(lambda: make(rows[0], 1), "0", tmp_path, lambda: make(rows[1], 2))


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e9, float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masks_are_the_same_in_every_dtype(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8))
        model.register_buffer("mask", torch.full((8, 8), value).triu(1))
        return model

    _round_trip(make, "0", tmp_path, lambda: make().to(dtype))
    _round_trip(lambda: make().to(dtype), "0", tmp_path, make)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_training_moves_by_its_statistics_is_taken(tmp_path: Path, norm: Callable) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(norm(nn.Linear(16, 16)))

    model = mapsurgery.patch(make(), "0", rank=2).train()
    for _ in range(5):
        model(torch.randn(4, 16))
    mapsurgery.save(model, tmp_path / "file")
    loaded = mapsurgery.load(make(), tmp_path / "file").eval()
    x = torch.randn(2, 16)
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_ternary_weights_are_rounded_all_alike(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(32, 32))
        values = torch.randint(-1, 2, (32, 32), generator=torch.Generator().manual_seed(0))
        model[0].weight = nn.Parameter(values * 0.01234567)
        nn.init.zeros_(model[0].bias)
        return model

    for dtype in (torch.bfloat16, torch.float16):
        _round_trip(make, "0", tmp_path, lambda dtype=dtype: make().to(dtype))


BUFFERS = {
    "uint16": torch.arange(8).to(torch.uint16),
    "huge": torch.full((4,), 1e200, dtype=torch.float64),
    "complex": torch.randn(4, dtype=torch.complex64),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0),
    "number": torch.tensor(3.0),
}


@pytest.mark.parametrize("kind", [*BUFFERS])
@pytest.mark.parametrize("changed", [False, True])
def test_buffers_of_every_kind_are_saved_and_loaded(tmp_path: Path, kind: str, changed: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8))
        model.register_buffer("kept", BUFFERS[kind].clone())
        return model

    model = mapsurgery.patch(make(), "0", rank=2)
    if changed:
        model.kept = torch.zeros_like(model.kept)
    mapsurgery.save(model, tmp_path / "file")
    loaded = mapsurgery.load(make(), tmp_path / "file")
    assert torch.equal(loaded.kept, model.kept) and loaded.kept.dtype == BUFFERS[kind].dtype


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 8, mode="sum"), lambda: nn.EmbeddingBag(9, 8, mode="mean")),
    "RNN": (lambda: nn.RNN(8, 8), lambda: nn.RNN(8, 8, nonlinearity="relu")),
    "LSTM": (lambda: nn.LSTM(8, 8), lambda: nn.LSTM(8, 8, batch_first=True)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2), lambda: nn.MultiheadAttention(8, 4)),
    "MultiheadAttention with zeros": (
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True),
    ),
    "MultiheadAttention batch first": (
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "Linear": (lambda: nn.Linear(8, 8, bias=False), lambda: nn.Linear(8, 8)),
}


@pytest.mark.parametrize("kind", [*LAYERS])
def test_a_layer_with_other_settings_is_refused(tmp_path: Path, kind: str) -> None:
    first, second = LAYERS[kind]
    torch.manual_seed(0)
    own, other = nn.Sequential(first()), nn.Sequential(second())
    other.load_state_dict(own.state_dict(), strict=False)
    mapsurgery.save(mapsurgery.patch(copy.deepcopy(own), "*", rank=2), tmp_path / "file")
    mapsurgery.load(own, tmp_path / "file")
    name = kind.partition(" ")[0]
    with pytest.raises(ValueError, match=f"is a {name}.*trained on a {name}"):
        mapsurgery.load(other, tmp_path / "file")


def test_a_quantised_layer_without_the_bias_is_refused(tmp_path: Path) -> None:
    plain = nn.Linear(128, 64)
    other = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    other.load_state_dict({"weight": plain.weight.detach()})
    mapsurgery.save(to_generic_point(mapsurgery.patch(nn.Sequential(plain), "0", rank=2)), tmp_path / "file")
    with pytest.raises(ValueError, match=r"another base: 0 is a Linear\(bias=False\)"):
        mapsurgery.load(nn.Sequential(other).to("cpu"), tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_statistics_are_compared(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of images of 0 to 255, variances are beyond what float16 holds."""

    def make(scale: float = 1.0) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64)).eval()
        model[1].running_var.uniform_(7e4, 9e4).mul_(scale)
        return model

    mapsurgery.save(to_generic_point(mapsurgery.patch(make(), "0", rank=2)), tmp_path / "file")
    mapsurgery.load(make().to(dtype), tmp_path / "file")
    with pytest.raises(ValueError, match="running_var"):
        mapsurgery.load(make(9).to(dtype), tmp_path / "file")


# The sketch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(7, 5), (300, 1000), (16, 8, 3, 3), (9,), (1, 4000), (130, 1), (2, 0), ()],
    ids=lambda s: "x".join(map(str, s)),
)
def test_the_native_fingerprint_is_the_defined_one(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, wanted = ops.fingerprint(weight), operators.fingerprint(weight)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    rows = weight.double().reshape(weight.shape[0] if weight.dim() > 1 else 1, -1)
    u, v = operators._weights(rows.shape[0], rows.device), operators._weights(rows.shape[1], rows.device)
    signed = u[:, None] * rows * v
    for s in range(8):
        torch.testing.assert_close(wanted[1 + s], signed[:, s::8].sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(wanted[0], rows.square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "view", [torch.t, lambda w: w[::2, 1:], lambda w: w.expand(5, *w.shape)], ids=["t", "cut", "more"]
)
def test_strides_do_not_change_a_fingerprint(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = view(torch.randn(40, 30))
    torch.testing.assert_close(
        ops.fingerprint(weight), operators.fingerprint(weight.contiguous()), rtol=1e-12, atol=1e-12
    )


def test_the_numbers_of_a_sketch_are_the_same_for_ever() -> None:
    numbers = operators._weights(100_000, torch.device("cpu"))
    assert abs(numbers.mean()) < 0.02 and numbers.std() == pytest.approx(1, abs=0.01)
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 0.02
    assert len(numbers.unique()) == 100_000
    assert numbers[:3].tolist() == pytest.approx(
        [1.3278275898326373, -0.2371939760159737, -1.6404815367007768], rel=1e-15
    )


def test_a_sketch_tells_two_weights_apart_by_about_their_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(200):
        a, b = (torch.randn(20, 30, generator=generator, dtype=torch.float64) for _ in range(2))
        apart = torch.linalg.vector_norm(ops.fingerprint(a)[1:] - ops.fingerprint(b)[1:])
        ratios.append(float(apart / (a - b).norm()))
    assert min(ratios) > 0.15 and max(ratios) < 2.5
    assert sum(r * r for r in ratios) / len(ratios) == pytest.approx(1, abs=0.15)


def test_sketches_of_blocks_of_rows_add_up() -> None:
    """A shard's own part is added to the others': the whole's is known without gathering it."""
    weight = torch.randn(32, 24, dtype=torch.float64)
    u = operators._weights(32, weight.device)
    whole = ops.fingerprint(weight)
    v = operators._weights(24, weight.device)
    parts = [(u[i : i + 8] @ weight[i : i + 8] * v).reshape(-1, 8).sum(0) for i in range(0, 32, 8)]
    torch.testing.assert_close(whole[1:], torch.stack(parts).sum(0))
