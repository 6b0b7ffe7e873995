"""Tools around the library where only a GPU shows what they do.

Mixed precision with scaled losses, quantised kernels, captured graphs, offloading, files that move between devices.

Each runs on the CPU as well where the tool does, so that a GPU finds tests that were right before.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import convnext, gpt2, llama, mixtral, text_data, tokens, unet, vit
from torch import Tensor, nn

import mapsurgery


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return torch.device(request.param)


AUTOCAST = [torch.bfloat16, torch.float16]


def transformer() -> nn.Module:
    """torch's own, whose encoder has a fast path without autograd."""
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 2).eval()


def lstm() -> nn.Module:
    torch.manual_seed(0)
    return nn.LSTM(16, 16, 2, batch_first=True).eval()


def images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "llama": (llama, lambda: (tokens(),)),
    "gpt2_tied": (gpt2, lambda: (tokens(),)),
    "mixtral": (mixtral, lambda: (tokens(),)),
    "vit": (vit, images),
    "convnext": (convnext, images),
    "unet": (unet, lambda: (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16))),
    "transformer": (transformer, lambda: (torch.randn(2, 5, 32),)),
    "lstm": (lstm, lambda: (torch.randn(2, 5, 16),)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str, device: torch.device) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A patched model whose adapters have left their start, and its input."""
    make, inputs = MODELS[name]
    model = mapsurgery.patch(make().to(device), "*", rank=4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (p for group in mapsurgery.param_groups(model, lr=1.0) for p in group["params"]):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    torch.manual_seed(3)
    return model, tuple(x.to(device) for x in inputs())


def first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def out(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return first(model(*inputs))


def _skip_what_the_cpu_lacks(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and (dtype == torch.float16 or name == "lstm"):
        pytest.skip("torch has no such kernel on every CPU")


@every_model
def test_verify_agrees(name: str, device: torch.device) -> None:
    model, inputs = made(name, device)
    mapsurgery.verify(model, *inputs)


@every_model
@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
def test_verify_agrees_under_autocast(name: str, dtype: torch.dtype, device: torch.device) -> None:
    _skip_what_the_cpu_lacks(name, dtype, device)
    model, inputs = made(name, device)
    with torch.autocast(device.type, dtype):
        mapsurgery.verify(model, *inputs)


@every_model
def test_a_file_goes_from_device_to_device(name: str, device: torch.device, tmp_path: Path) -> None:
    model, inputs = made(name, device)
    mapsurgery.save(model, tmp_path / "there.safetensors")
    home = mapsurgery.load(MODELS[name][0](), tmp_path / "there.safetensors")
    found = out(home, tuple(x.cpu() for x in inputs))
    torch.testing.assert_close(found, out(model, inputs).cpu(), rtol=2e-3, atol=2e-3)
    mapsurgery.save(home, tmp_path / "back.safetensors")
    back = mapsurgery.load(MODELS[name][0]().to(device), tmp_path / "back.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


@every_model
def test_moving_copying_merging_and_unpatching(name: str, device: torch.device) -> None:
    model, inputs = made(name, device)
    wanted = out(model, inputs)
    assert torch.equal(out(copy.deepcopy(model), inputs), wanted)
    assert torch.equal(out(model.cpu().to(device), inputs), wanted)
    with mapsurgery.disabled(model):
        base = out(model, inputs)
    merged = mapsurgery.merge(copy.deepcopy(model))
    torch.testing.assert_close(out(merged, inputs), wanted, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(out(mapsurgery.unpatch(model), inputs), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
@pytest.mark.parametrize("name", ["vit", "convnext", "llama", "mixtral", "lstm"])
def test_training_with_scaled_losses_lowers_the_loss(
    name: str, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> None:
    if channels_last and name != "convnext":
        pytest.skip("a layout of images")
    _skip_what_the_cpu_lacks(name, dtype, device)
    model, inputs = made(name, device)
    if channels_last:
        model, inputs = model.to(memory_format=torch.channels_last), (inputs[0].to(memory_format=torch.channels_last),)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, lr=1e-2), fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    model.train()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = (first(model(*inputs)).float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    mapsurgery.verify(model.eval(), *inputs, optimizer=optimizer)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_plain_ones(reentrant: bool, device: torch.device) -> None:
    def gradients(checkpointed: bool) -> list[Tensor]:
        model, inputs = made("llama", device)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with torch.autocast(device.type, torch.bfloat16):
            first(model(*inputs)).float().square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        assert wanted.abs().max() > 0 and torch.equal(found, wanted)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["llama", "convnext"])
def test_compiled_training_is_the_eager_one(name: str, mode: str, device: torch.device, _fresh_compiler: None) -> None:
    if device.type == "cpu":
        pytest.skip("test_compile has the CPU")
    (eager, inputs), (compiled, _) = made(name, device), made(name, device)
    run = torch.compile(compiled, mode=mode)
    optimizers = [torch.optim.SGD(mapsurgery.param_groups(m, lr=1e-2)) for m in (eager, compiled)]
    for _ in range(3):
        for call, optimizer in zip((eager, run), optimizers, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            first(call(*inputs)).square().mean().backward()
            optimizer.step()
    for found, wanted in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


# Quantised bases -----------------------------------------------------------------------------------------------------


def _quantisation(kind: str) -> Any:
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        if kind == "bnb_8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=kind == "bnb_nf4_double",
        )
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    configs = {"torchao_int8": "Int8WeightOnlyConfig", "torchao_fp8": "Float8WeightOnlyConfig"}
    return TorchAoConfig(getattr(quantization, configs[kind])())


@pytest.mark.parametrize("kind", ["bnb_nf4", "bnb_nf4_double", "bnb_8bit", "torchao_int8", "torchao_fp8"])
def test_a_quantised_base_trains_verifies_saves_and_merges(kind: str, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu":
        pytest.skip("test_quantised has the CPU")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    source = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(torch.bfloat16)
    source.save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        options = {"quantization_config": _quantisation(kind), "device_map": {"": 0}, "dtype": torch.bfloat16}
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", **options).eval()

    model, inputs = base(), (tokens().to(device),)
    before = out(model, inputs)
    mapsurgery.patch(model, "*proj", rank=8)
    torch.testing.assert_close(out(model, inputs), before, rtol=2e-2, atol=2e-2)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, lr=5e-3))
    losses = []
    for _ in range(10):
        loss = model(*inputs, labels=inputs[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    mapsurgery.verify(model, *inputs, optimizer=optimizer)
    wanted = out(model, inputs)
    mapsurgery.save(model, tmp_path / "adapter.safetensors")
    loaded = mapsurgery.load(base(), tmp_path / "adapter.safetensors")
    assert torch.equal(out(loaded, inputs), wanted)
    torch.testing.assert_close(
        out(mapsurgery.merge(loaded, quantised="dequantise"), inputs), wanted, rtol=5e-2, atol=5e-2
    )


# Trainers and loaders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16", "float32"])
def test_the_trainer_trains_and_goes_on_exactly(precision: str, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("what a GPU is for")
    from transformers import TrainingArguments

    from mapsurgery.integrations.transformers import AdapterTrainer

    def run(folder: str, seed: int, **options: Any) -> list[Tensor]:
        torch.manual_seed(seed)
        model = mapsurgery.patch(llama(), "*proj", rank=4)
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=6,
            save_steps=3,
            learning_rate=1e-2,
            use_cpu=device.type == "cpu",
            report_to=[],
            disable_tqdm=True,
            **({} if precision == "float32" else {precision: True}),
        )
        AdapterTrainer(model, arguments, train_dataset=text_data()).train(**options)
        return [p.detach().cpu() for p in model.parameters() if p.requires_grad]

    whole = run("whole", 0)
    resumed = run("resumed", 1, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("patch_first", [True, False])
def test_weights_that_are_offloaded_compute_on_the_gpu(patch_first: bool, device: torch.device) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = made("llama", torch.device("cpu"))
    wanted = out(copy.deepcopy(model).to(device), tuple(x.to(device) for x in inputs))
    trained = copy.deepcopy(mapsurgery.adapter_state_dict(model))
    if not patch_first:
        mapsurgery.unpatch(model)
    accelerate.cpu_offload(model, execution_device=device)
    if not patch_first:
        mapsurgery.patch(model, "*", rank=4)
        mapsurgery.load_adapter_state_dict(model, trained)
    torch.testing.assert_close(out(model, tuple(x.to(device) for x in inputs)), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("optimiser", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_eight_bit_optimisers_train_it(optimiser: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("their kernels are for GPUs")
    import bitsandbytes

    model, inputs = made("llama", device)
    optimizer = getattr(bitsandbytes.optim, optimiser)(mapsurgery.param_groups(model, lr=3e-3))
    losses = []
    for _ in range(10):
        loss = first(model(*inputs)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    mapsurgery.verify(model, *inputs, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_reducers_of_one_process(kind: str, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu":
        pytest.skip("test_wrapped_first has the CPU")
    from torch import distributed

    distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        (plain, inputs), (model, _) = made("llama", device), made("llama", device)
        if kind == "ddp":
            run: nn.Module = nn.parallel.DistributedDataParallel(model, device_ids=[0])
        else:
            from torch.distributed.fsdp import fully_shard

            for layer in model.model.layers:
                fully_shard(layer)
            run = fully_shard(model)
        optimizers = [torch.optim.AdamW(mapsurgery.param_groups(m, lr=1e-2)) for m in (plain, model)]
        for _ in range(3):
            for call, optimizer in zip((plain, run), optimizers, strict=True):
                first(call(*inputs)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(out(run, inputs), out(plain, inputs), rtol=1e-3, atol=1e-4)
    finally:
        distributed.destroy_process_group()
