"""A patched model is an ordinary torch model: copied, pickled, compiled, exported, checkpointed, cast, replicated."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from definition import CASES, Case, Net, image, net, patched_case, to_generic_point, train_steps, weight_of
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import mapsurgery

every_layer = pytest.mark.parametrize("case", CASES, ids=str)


def _patched(**options: object) -> nn.Module:
    return to_generic_point(mapsurgery.patch(net(), "*", rank=2, **options)).eval()


def _gradients(model: nn.Module, y: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    # The same numbers for every dtype: drawn in a narrow one, they are others with some releases of torch.
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    found = torch.autograd.grad(y, [model.get_parameter(name) for name in names], direction)
    return dict(zip(names, found, strict=True))


def _copies(model: nn.Module) -> dict[str, nn.Module]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@every_layer
def test_copies_compute_the_same_bitwise_and_share_nothing(case: Case) -> None:
    _, adapted, x = patched_case(case)
    expected = adapted(x)
    for name, other in _copies(adapted).items():
        assert type(other) is type(adapted), name
        assert torch.equal(other(x), expected), name
        own = {p.data_ptr() for p in adapted.parameters()}
        assert not own & {p.data_ptr() for p in other.parameters()}, name
        assert list(dict(other.named_parameters())) == list(dict(adapted.named_parameters()))
        mapsurgery.unpatch(other)
        assert type(other) is type(case.make())


def test_copies_of_a_model_train_save_and_merge(tmp_path) -> None:
    model = train_steps(mapsurgery.patch(net(), "*", rank=2, train="norm"), image())
    for name, other in _copies(model).items():
        assert {n: p.requires_grad for n, p in other.named_parameters()} == {
            n: p.requires_grad for n, p in model.named_parameters()
        }, name
        mapsurgery.save(other, tmp_path / name)
        mapsurgery.merge(train_steps(other, image()), keep_base=True)
        for again in _copies(other).values():
            mapsurgery.unmerge(again)


def test_a_shallow_copy_shares_the_parameters() -> None:
    layer = _patched().body[0]
    other = copy.copy(layer)
    assert type(other) is type(layer) and other.adapter.A is layer.adapter.A
    x = torch.randn(3, 8)
    assert torch.equal(other(x), layer(x))


@every_layer
def test_functional_call_follows_the_given_parameters(case: Case) -> None:
    original, adapted, x = patched_case(case, dtype=torch.float64)
    other = copy.deepcopy(adapted)
    with torch.no_grad():
        other.adapter.A.mul_(-1)
        other.adapter.alpha.fill_(-0.5)
    found = functional_call(adapted, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(found, functional_call(original, {"weight": weight_of(other)}, (x,)))


@every_layer
def test_functional_gradients_are_the_eager_ones(case: Case) -> None:
    _, adapted, x = patched_case(case, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}
    found = torch.func.grad(lambda p: functional_call(adapted, p, (x,)).pow(2).sum())(parameters)
    adapted(x).pow(2).sum().backward()
    for name, grad in found.items():
        torch.testing.assert_close(grad, adapted.get_parameter(name).grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_nothing(use_reentrant: bool, dropout: float) -> None:
    for case in CASES:
        _, adapted, x = patched_case(case, dtype=torch.float64, dropout=dropout)
        results = []
        for run in (adapted, lambda x, a=adapted: checkpoint(a, x, use_reentrant=use_reentrant)):
            torch.manual_seed(0)
            x = x.detach().requires_grad_()
            adapted.zero_grad()
            run(x).pow(2).sum().backward()
            results.append([x.grad, *(p.grad for p in adapted.adapter.own_parameters().values())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), case.name


@every_layer
def test_a_data_parallel_replica_computes_the_same_and_passes_gradients_on(case: Case) -> None:
    """What torch.nn.parallel.replicate does on each GPU, with copies of the parameters on the CPU."""
    _, adapted, x = patched_case(case, dtype=torch.float64)
    modules = list(adapted.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child]) if child is not None else None
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer.clone())
    y = replicas[adapted](x)
    assert torch.equal(y, adapted(x))
    y.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.adapter.own_parameters().values())


# Casting and moving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_cast_model_keeps_working_and_its_norm_unrounded(dtype: torch.dtype) -> None:
    model = _patched()
    expected, norm = model(image()), model.stem.adapter.weight_norm.clone()
    assert model.to(dtype) is model
    assert torch.equal(model.stem.adapter.weight_norm, norm)
    y = model(image().to(dtype))
    assert y.dtype == dtype
    tolerance = 20 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    assert (y.double() - expected.double()).norm() <= tolerance * expected.norm()
    y.float().sum().backward()
    own = torch.promote_types(dtype, torch.float32)  # a cast does not round an adapter
    assert all(p.grad.dtype == own for p in model.parameters() if p.requires_grad)


def test_a_model_moves_between_devices(device: torch.device) -> None:
    model = _patched()
    expected = model(image())
    model.to(device)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {device.type}
    torch.testing.assert_close(model(image().to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)
    model.cpu()
    torch.testing.assert_close(model(image()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_training_stays_close_to_full_precision(dtype: torch.dtype, device: torch.device) -> None:
    model = _patched().to(device)
    x = image().to(device)
    full = _gradients(model, model(x)) if device.type == "cpu" else None
    with torch.autocast(device.type, dtype=dtype):
        y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)
    if full is not None:
        for name, grad in _gradients(model, y).items():
            assert grad.dtype == torch.float32
            assert (grad - full[name]).norm() <= 0.15 * full[name].norm() + 0.05, name


def test_inference_mode_and_no_grad_give_the_same() -> None:
    model = _patched()
    expected = model(image()).detach()
    with torch.no_grad():
        assert torch.equal(model(image()), expected)
    with torch.inference_mode():
        assert torch.equal(model(image()), expected)


def test_a_model_patched_under_no_grad_trains() -> None:
    with torch.no_grad():
        model = mapsurgery.patch(net(), "*", rank=2)
    assert all(p.requires_grad for p in model.stem.adapter.own_parameters().values())
    train_steps(model, image(), steps=1)


# Compiling (more of it: test_compile, test_export) -------------------------------------------------------------------


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5, patch_size=16
    ).eval()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_layers_are_the_eager_ones() -> None:
    names = ("linear", "transformers_conv1d", "conv2d", "conv2d_depthwise", "conv1d_unbatched")
    layers, inputs = nn.ModuleList(), []
    for case in (c for c in CASES if c.name in names):
        _, adapted, x = patched_case(case, dtype=torch.float64)
        layers.append(adapted)
        inputs.append(x)

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(layers, inputs, strict=True)]

    found, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs), run(inputs)
    own, directions = [p for p in layers.parameters() if p.requires_grad], [torch.randn_like(y) for y in expected]
    gradients = [torch.autograd.grad(ys, own, directions) for ys in (found, expected)]
    for y, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_vit_of_inductors_code_is_the_eager_one_with_its_gradients() -> None:
    model = to_generic_point(mapsurgery.patch(_vit(), "*", rank=2, train="norm")).double()
    for block in model.blocks:
        block.attn.fused_attn = False  # torch 2.11 compiles the backward of its fused attention in float64 wrongly
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True)
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    for (name, a), b in zip(_gradients(model, y).items(), _gradients(model, expected).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_autocast_is_the_eager_one() -> None:
    model = _patched()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = compiled(image()), model(image())
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


# Fast paths of torch's own modules -----------------------------------------------------------------------------------


def test_attention_uses_the_adapted_output_projection_in_training_and_on_the_fast_path() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    original = copy.deepcopy(attention)
    to_generic_point(mapsurgery.patch(attention, "out_proj", rank=2))
    x = torch.randn(2, 5, 8)
    weights = {"out_proj.weight": weight_of(attention.out_proj).float()}
    expected = functional_call(original, weights, (x, x, x), {"need_weights": False})[0]
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected, rtol=1e-5, atol=1e-5)
    for fast in (True, False):
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            with torch.no_grad():
                found = attention(x, x, x, need_weights=False)[0]
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_encoder_layers_fast_path_uses_the_adapted_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    original = copy.deepcopy(layer)
    to_generic_point(mapsurgery.patch(layer, "*", rank=2))
    names = ["self_attn.out_proj", "linear1", "linear2"]
    x = torch.randn(2, 5, 8)
    weights = {f"{name}.weight": weight_of(layer.get_submodule(name)).float() for name in names}
    weights["self_attn.in_proj_weight"] = weight_of(layer.self_attn, "in_proj_weight").float()
    expected = functional_call(original, weights, (x,))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: calls.append(1) or fast(*a, **k))
    with torch.no_grad():
        found = layer(x)
    assert calls, "the fast path was not taken"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not mapsurgery.verify(layer, x).failures
    encoder = nn.TransformerEncoder(layer, 2).eval()  # deep copies of the adapted layer
    assert not mapsurgery.verify(mapsurgery.unpatch(encoder.layers[0]) and encoder.layers[1], x).failures


def test_whoever_reads_the_weight_gets_the_adapted_one() -> None:
    model = _patched()
    torch.testing.assert_close(model.stem.weight.double(), weight_of(model.stem), rtol=1e-5, atol=1e-6)
    model.stem.weight.sum().backward()
    assert all(p.grad is not None for p in model.stem.adapter.own_parameters().values())


def test_double_backward_through_a_model_is_that_of_the_materialised_weights() -> None:
    layer = to_generic_point(mapsurgery.patch(nn.Linear(4, 3).double(), "*", rank=2))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    dx.pow(2).sum().backward()
    a = layer.adapter
    leaves = [p.detach().clone().requires_grad_() for p in a.own_parameters().values()]
    A, B, alpha, beta = leaves
    W = layer.get_parameter("weight")
    unit = W.norm()
    BA = B @ A
    W_ = (1 + alpha) * W + unit * beta * BA / torch.sqrt((BA**2).sum() + (a.init.tau * unit) ** 2)
    z = x.detach().clone().requires_grad_()
    (dz,) = torch.autograd.grad((z @ W_.t() + layer.bias).pow(3).sum(), z, create_graph=True)
    expected = torch.autograd.grad(dz.pow(2).sum(), leaves)
    for p, want in zip(a.own_parameters().values(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-9)


def test_forward_mode_works_on_a_patched_layer_as_on_the_original() -> None:
    layer = mapsurgery.patch(nn.Linear(4, 3), "*", rank=2)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(2, 4), torch.ones(2, 4))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(x)).tangent
    assert tangent is not None


def test_ema_by_timm_averages_the_adapters() -> None:
    from timm.utils import ModelEmaV3

    model = mapsurgery.patch(net(), "*", rank=2)
    ema = ModelEmaV3(model, decay=0.5)
    train_steps(model, image(), steps=1)
    ema.update(model)
    expected = model.body[0].adapter.B * 0.5
    torch.testing.assert_close(ema.module.body[0].adapter.B, expected)


def test_net_can_be_pickled_by_name() -> None:
    assert isinstance(pickle.loads(pickle.dumps(Net())), Net)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_while_disabled_is_not_disabled(copy_of) -> None:
    model = to_generic_point(mapsurgery.patch(nn.Sequential(nn.Linear(4, 3)), "*", rank=2))
    x = torch.randn(2, 4)
    expected = model(x)
    with mapsurgery.disabled(model):
        other = copy_of(model)
    assert torch.equal(other(x), expected)


def test_a_compiled_wrapper_can_be_patched_and_saved(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    wrapper = torch.compile(model, backend="eager")
    assert mapsurgery.patch(wrapper, "0", rank=2, train="1") is wrapper
    mapsurgery.save(wrapper, tmp_path / "a.safetensors")
    mapsurgery.unpatch(wrapper)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


@pytest.mark.parametrize(
    "name", ["linear", "linear_no_bias", "conv1d", "conv2d", "conv2d_depthwise", "conv1d_unbatched"]
)
def test_the_output_can_be_changed_in_place(name: str) -> None:
    original, adapted, x = patched_case(next(c for c in CASES if c.name == name), dtype=torch.float64)
    changed = adapted(x)
    changed += 1
    expected = _gradients(adapted, adapted(x) + 1)
    for a, b in zip(_gradients(adapted, changed).values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b)
