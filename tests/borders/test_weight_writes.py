"""What is written through `layer.weight` reaches the registered weight, or raises: nothing is lost without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from homes import REFUSALS, OwnForward, registered, trained, with_adapters_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import mapsurgery

Way = Callable[[nn.Linear], Any]


def assign(name: str, value: Callable[[Tensor], Any]) -> Way:
    """layer.weight.<name> = value(layer.weight)"""
    return lambda layer: setattr(layer.weight, name, value(layer.weight))


def _augmented(layer: nn.Linear) -> None:
    layer.weight += 1


def _augmented_data(layer: nn.Linear) -> None:
    layer.weight.data += 1


def _augmented_item(layer: nn.Linear) -> None:
    layer.weight[0] += 1


def _reassigned(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.ones(4, 8))


def _reassigned_from_itself(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _numpy_item(layer: nn.Linear) -> None:
    layer.weight.detach().numpy()[0] = 5


def _numpy_of_dlpack(layer: nn.Linear) -> None:
    torch.from_dlpack(layer.weight.detach()).zero_()


def _swapped(layer: nn.Linear) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.ones(4, 8)))


def _in_inference_mode(layer: nn.Linear) -> None:
    with torch.inference_mode():
        layer.weight.zero_()


def _optimised(layer: nn.Linear) -> None:
    with torch.enable_grad():
        weight = layer.weight
        optimizer = torch.optim.SGD([weight], lr=1.0)
        weight.sum().backward()
        optimizer.step()


def _by_out_in_a_view(layer: nn.Linear) -> None:
    torch.mul(torch.ones(8), 3, out=layer.weight[1])


def _element_by_element(layer: nn.Linear, name: str, *args: Any) -> None:
    """torch walks the memory itself, where a tensor that has none ends the process: not to be tried without a guard."""
    for weight in (layer.weight, layer.weight.detach()):
        if type(weight) not in (Tensor, nn.Parameter):
            assert getattr(type(weight), name) is not getattr(Tensor, name), f"{name} ends the process"
    getattr(layer.weight, name)(*args)


HALF = torch.tensor([True, False, True, False])
ONES, ROWS = torch.ones(4, 8), torch.tensor([0, 2])
UNDER_NO_GRAD: dict[str, Way] = {
    # the tensor itself
    "zero_": lambda m: m.weight.zero_(),
    "add_": lambda m: m.weight.add_(1),
    "mul_": lambda m: m.weight.mul_(2),
    "copy_": lambda m: m.weight.copy_(ONES),
    "clamp_": lambda m: m.weight.clamp_(0, 0.1),
    "lerp_": lambda m: m.weight.lerp_(ONES, 0.5),
    "masked_fill_": lambda m: m.weight.masked_fill_(HALF[:, None], 3),
    "index_fill_": lambda m: m.weight.index_fill_(0, ROWS, 3),
    "index_put_": lambda m: m.weight.index_put_((ROWS,), torch.tensor(3.0)),
    "index_add_": lambda m: m.weight.index_add_(0, ROWS, torch.ones(2, 8)),
    "scatter_": lambda m: m.weight.scatter_(0, torch.zeros(1, 8, dtype=torch.long), 3.0),
    "addmm_": lambda m: m.weight.addmm_(torch.ones(4, 2), torch.ones(2, 8)),
    "apply_": lambda m: _element_by_element(m, "apply_", lambda value: value + 1),
    "map_": lambda m: _element_by_element(m, "map_", ONES, lambda value, other: value + other),
    "t_": lambda m: m.weight.t_(),
    "set_": lambda m: m.weight.set_(torch.ones(4, 8)),
    "resize_": lambda m: m.weight.resize_(2, 8),
    "item": lambda m: m.weight.__setitem__(0, 5.0),
    "mask": lambda m: m.weight.__setitem__(HALF, 5.0),
    "augmented": _augmented,
    "augmented_item": _augmented_item,
    "init": lambda m: nn.init.ones_(m.weight),
    "init_random": lambda m: nn.init.trunc_normal_(m.weight, generator=torch.Generator().manual_seed(0)),
    "out": lambda m: torch.add(m.weight, 1, out=m.weight),
    "out_of_a_view": _by_out_in_a_view,
    "foreach_add": lambda m: torch._foreach_add_([m.weight], 1.0),
    "foreach_copy": lambda m: torch._foreach_copy_([m.weight], [ONES]),
    "foreach_zero": lambda m: torch._foreach_zero_([torch.zeros(1), m.weight.detach()]),
    # views of it
    "transposed": lambda m: m.weight.t().zero_(),
    "T": lambda m: m.weight.T.add_(1),
    "mT": lambda m: m.weight.mT.mul_(2),
    "view": lambda m: m.weight.view(-1).zero_(),
    "view_as": lambda m: m.weight.view_as(torch.empty(8, 4)).zero_(),
    "view_dtype": lambda m: m.weight.view(torch.int32).zero_(),
    "reshape": lambda m: m.weight.reshape(2, 16)[0].zero_(),
    "flatten": lambda m: m.weight.flatten().fill_(2),
    "chunk": lambda m: m.weight.chunk(2)[1].zero_(),
    "split": lambda m: m.weight.split(1)[2].zero_(),
    "unbind": lambda m: m.weight.unbind()[3].zero_(),
    "iterated": lambda m: next(iter(m.weight)).zero_(),
    "narrow": lambda m: m.weight.narrow(0, 1, 2).zero_(),
    "select": lambda m: m.weight.select(1, 0).fill_(1),
    "diagonal": lambda m: m.weight.diagonal().zero_(),
    "as_strided": lambda m: m.weight.as_strided((4,), (8,)).zero_(),
    "unfold": lambda m: m.weight.unfold(0, 2, 2).zero_(),
    "view_of_view": lambda m: m.weight[1:].t()[2:].add_(1),
    "detached": lambda m: m.weight.detach().zero_(),
    "contiguous": lambda m: m.weight.detach().contiguous().zero_(),
    "cpu": lambda m: m.weight.cpu().zero_(),
    "to": lambda m: m.weight.to(torch.float32).add_(1),
    "float": lambda m: m.weight.float().add_(1),
    # other doors to its memory
    "numpy": _numpy_item,
    "dlpack": _numpy_of_dlpack,
    "storage": lambda m: m.weight.detach().untyped_storage().fill_(0),
    "swap_tensors": _swapped,
    "optimizer": _optimised,
}
WITH_GRAD: dict[str, Way] = {
    "data_zero_": lambda m: m.weight.data.zero_(),
    "data_add_": lambda m: m.weight.data.add_(1),
    "data_copy_": lambda m: m.weight.data.copy_(ONES),
    "data_item": lambda m: m.weight.data.__setitem__(0, 5.0),
    "data_slice": lambda m: m.weight.data[:2].mul_(3),
    "data_normal": lambda m: m.weight.data.normal_(generator=torch.Generator().manual_seed(0)),
    "data_assigned": assign("data", lambda w: torch.ones(4, 8)),
    "data_grown": assign("data", lambda w: torch.ones(6, 8)),
    "data_augmented": _augmented_data,
    "detach_zero_": lambda m: m.weight.detach().zero_(),
    "detach_numpy": _numpy_item,
    "init_with_grad": lambda m: nn.init.zeros_(m.weight),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(torch.ones(32), [m.weight]),
    "inference_mode": _in_inference_mode,
    "reassigned": _reassigned,
    "reassigned_from_itself": _reassigned_from_itself,
}


def _no_grad(way: Way) -> Way:
    def run(layer: nn.Linear) -> None:
        with torch.no_grad():
            way(layer)

    return run


WAYS = {**{name: _no_grad(way) for name, way in UNDER_NO_GRAD.items()}, **WITH_GRAD}
LAYERS = {"linear": nn.Linear, "own_forward": OwnForward}


def data(width: int = 8) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(7))


def base(kind: type[nn.Linear], weight: Tensor | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(kind(8, 4))
    if weight is not None:
        model[0].weight = nn.Parameter(weight.clone())
    return model


def adapted(kind: type[nn.Linear], weight: Tensor | None = None) -> nn.Sequential:
    model = base(kind, weight)
    torch.manual_seed(1)
    return trained(mapsurgery.patch(model, "0", rank=2))


def assert_reached_or_refused(kind: type[nn.Linear], way: Way) -> None:
    """The write raises and changes nothing, or W is what the same write makes of a plain layer's weight."""
    plain, model = base(kind), adapted(kind)
    before, adapter = registered(model[0]).detach().clone(), [p.clone() for p in model[0].adapter.parameters()]
    output = model(data())
    with torch.no_grad():
        plain[0].weight.requires_grad_(False)  # as the frozen one
    way(plain[0])
    written = registered(plain[0]).detach()
    assert written.shape != before.shape or not torch.equal(written, before), "not a write"
    try:
        way(model[0])
    except REFUSALS as refusal:
        assert len(str(refusal)) > 20, refusal
        assert torch.equal(registered(model[0]), before)
        assert torch.equal(model(data()), output)
        return
    assert torch.equal(registered(model[0]), written), "the write is lost"
    assert all(torch.equal(p, a) for p, a in zip(model[0].adapter.parameters(), adapter, strict=True))
    x = data(written.shape[1])
    if written.shape == before.shape:
        expected = with_adapters_of(model, adapted(kind, written))
        assert torch.equal(model(x), expected(x)), "||W|| is that of the weight before"
        assert not torch.equal(model(x), output)


@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_write_reaches_the_weight_or_raises(kind: type[nn.Linear], way: Way) -> None:
    """Each way that changes a plain layer's weight."""
    if kind is OwnForward and way in (WAYS["t_"], WAYS["resize_"], WAYS["data_grown"]):
        pytest.skip("the shape is the same matter in each kind of layer")
    if way is WAYS["optimizer"]:
        pytest.skip("a frozen weight is not optimised: a test of its own")
    assert_reached_or_refused(kind, way)


def test_an_optimizer_does_not_take_a_computed_weight() -> None:
    """torch.optim refuses a tensor that is computed; it must not take one and train nothing."""
    model = adapted(nn.Linear)
    output = model(data())
    try:
        weight = model[0].weight
        optimizer = torch.optim.SGD([weight], lr=1.0)
        weight.sum().backward()
        optimizer.step()
    except REFUSALS:
        assert torch.equal(model(data()), output)
    else:
        assert not torch.equal(model(data()), output)


@pytest.mark.parametrize(
    "way",
    [WAYS["item"], WAYS["add_"], WAYS["foreach_copy"], _reassigned],  # torch counts no write through .data or numpy
    ids=["item", "add_", "foreach", "reassigned"],
)
def test_a_write_inside_disabled_reaches_the_weight_or_raises(way: Way) -> None:
    """There layer.weight reads as W: what is written acts afterwards too, with the norm of the new W."""

    def inside(layer: nn.Linear) -> None:
        if hasattr(layer, "adapter"):
            with mapsurgery.disabled(layer_model[0]):
                way(layer)
        else:
            way(layer)

    layer_model: list[nn.Module] = []
    plain, model = base(nn.Linear), adapted(nn.Linear)
    layer_model.append(model)
    before, output = registered(model[0]).detach().clone(), model(data())
    plain[0].weight.requires_grad_(False)
    inside(plain[0])
    try:
        inside(model[0])
    except REFUSALS:
        assert torch.equal(registered(model[0]), before)
        assert torch.equal(model(data()), output)
        return
    assert torch.equal(registered(model[0]), registered(plain[0]))
    expected = with_adapters_of(model, adapted(nn.Linear, registered(plain[0]).detach()))
    assert torch.equal(model(data()), expected(data()))


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("how", ["method", "attribute"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_requires_grad_reaches_the_weight_or_raises(asked: bool, how: str, grad: bool) -> None:
    """To freeze or unfreeze the weight through its name acts on the registered one, or raises."""
    model = adapted(nn.Linear)
    with torch.set_grad_enabled(grad):
        try:
            if how == "method":
                model[0].weight.requires_grad_(asked)
            else:
                model[0].weight.requires_grad = asked
        except REFUSALS:
            return
    assert registered(model[0]).requires_grad == asked
    assert all(p.requires_grad for p in model[0].adapter.parameters())


def test_a_gradient_put_on_the_weight_is_there_or_raises() -> None:
    """layer.weight.grad = g."""
    model = adapted(nn.Linear)
    try:
        model[0].weight.grad = torch.ones(4, 8)
    except REFUSALS:
        return
    assert torch.equal(registered(model[0]).grad, torch.ones(4, 8))


def test_a_hook_put_on_the_weight_fires_or_raises() -> None:
    """A gradient hook on what `weight` reads is not forgotten."""
    model, seen = adapted(nn.Linear), []
    try:
        model[0].weight.register_hook(seen.append)
    except REFUSALS:
        return
    model(data()).sum().backward()
    assert len(seen) == 1


def test_shared_memory_is_that_of_the_weight_or_raises() -> None:
    """share_memory_ of the weight shares the registered one."""
    model = adapted(nn.Linear)
    try:
        model[0].weight.share_memory_()
    except REFUSALS:
        return
    assert registered(model[0]).is_shared()


def test_what_was_copied_may_be_written() -> None:
    """Copies of W' are the reader's own: writing into them is no write through the weight."""
    model = adapted(nn.Linear)
    output, value = model(data()), model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.clone().zero_()
        model[0].weight.detach().clone().numpy()[0] = 1
        (model[0].weight * 1).add_(1)
        model[0].weight.double().zero_()
        torch.empty(4, 8).copy_(model[0].weight)
        model[0].weight[HALF].zero_()
        torch.add(model[0].weight, 1, out=torch.empty(4, 8))
    assert torch.equal(model[0].weight, value) and torch.equal(model(data()), output)


def test_an_operation_in_place_that_changes_no_number_is_no_write() -> None:
    """RWKV divides its weights in place by 1."""
    model = adapted(nn.Linear)
    output = model(data())
    with torch.no_grad():
        model[0].weight.div_(1)
        model[0].weight.mul_(1.0)
    assert torch.equal(model(data()), output)


STRUCTURES: dict[str, Way] = {
    "old_weight_norm": lambda m: nn.utils.weight_norm(m),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
    "pruning_of_nothing": lambda m: prune.identity(m, "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("way", STRUCTURES.values(), ids=STRUCTURES)
def test_a_structure_put_around_the_weight_keeps_the_output_or_raises(way: Way) -> None:
    """It would read W', take the place of W, and be adapted a second time."""
    model = adapted(nn.Linear)
    output = model(data())
    try:
        way(model[0])
    except (*REFUSALS, KeyError, TypeError):
        torch.testing.assert_close(model(data()), output, rtol=0, atol=0)
    else:
        torch.testing.assert_close(model(data()), output, rtol=1e-5, atol=1e-5)


def test_quantising_after_patch_keeps_the_output_or_raises() -> None:
    """torchao's quantize_ reads `weight` and assigns the quantised one to it: W must not become a rounded W'."""
    api = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = trained(mapsurgery.patch(nn.Sequential(nn.Linear(64, 32)), "0", rank=2))
    output = model(data(64))
    try:
        api.quantize_(model, api.Int8WeightOnlyConfig())
    except REFUSALS:
        assert torch.equal(model(data(64)), output)
    else:
        assert (model(data(64)) - output).norm() < 0.02 * output.norm()


def test_merging_an_adapter_of_peft_keeps_the_output_or_raises() -> None:
    """peft adds its product to base_layer.weight.data."""
    peft = pytest.importorskip("peft")
    model = adapted(nn.Linear)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    output = wrapped(data())
    try:
        wrapped.merge_adapter()
    except REFUSALS:
        return
    torch.testing.assert_close(wrapped(data()), output, rtol=1e-5, atol=1e-5)


def _parametrised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))


def test_a_parametrised_weight_is_assigned_as_torch_does() -> None:
    """Through the right inverse of its parametrisation: the parts change, and W with its norm."""
    plain, model = _parametrised(), trained(mapsurgery.patch(_parametrised(), "0", rank=2))
    value = torch.randn(4, 8)
    with torch.no_grad():
        plain[0].weight = value
        model[0].weight = value
    parts = model[0].parametrizations.weight
    assert torch.equal(parts.original1, plain[0].parametrizations.weight.original1)
    expected = with_adapters_of(model, mapsurgery.patch(plain, "0", rank=2))
    torch.testing.assert_close(model(data()), expected(data()))


def test_a_parametrisation_is_not_removed_under_an_adapter() -> None:
    """It is refused before the layer has changed."""
    model = trained(mapsurgery.patch(_parametrised(), "0", rank=2))
    output = model(data())
    with pytest.raises(RuntimeError, match="patch then"):
        parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model(data()), output)
