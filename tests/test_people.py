"""What people type and see: `targets="all-linear"`, hints, forgotten heads, the base again, tables, a progress bar."""

from __future__ import annotations

import copy
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path

import peft
import pytest
import small_models
import timm
import torch
import torchvision
from definition import image, net, train_steps
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.cells import cell_len
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    ElectraConfig,
    ElectraForPreTraining,
    FNetConfig,
    FNetForPreTraining,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    XLMConfig,
    XLMForSequenceClassification,
    YolosConfig,
    YolosForObjectDetection,
)

import mapsurgery
from mapsurgery import progress as progress_module
from mapsurgery import tables
from mapsurgery.surgery.globs import ALL_LINEAR
from mapsurgery.tables import Table

BERT = BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=32,
)


def vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16))


def adapted(plan: mapsurgery.Plan) -> set[str]:
    return {layer.path for layer in plan.layers}


# all-linear ----------------------------------------------------------------------------------------------------------

BESIDE_PEFT = [  # a model, PEFT's task, and what PEFT adapts of it and we do not: inner layers of heads, image models'
    (small_models.llama, "CAUSAL_LM", set()),
    (lambda: small_models.llama(tied=True), "CAUSAL_LM", set()),
    (small_models.gpt2, "CAUSAL_LM", set()),
    (small_models.t5, "SEQ_2_SEQ_LM", set()),
    (lambda: BertForMaskedLM(BERT), None, {"cls.predictions.transform.dense"}),
    (lambda: BertForSequenceClassification(BERT), "SEQ_CLS", set()),
    (vit, None, {"classifier"}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "task", "more"), BESIDE_PEFT)
def test_all_linear_takes_what_peft_takes(make: Callable[[], nn.Module], task: str | None, more: set[str]) -> None:
    model = make()
    ours = adapted(mapsurgery.plan(model, ALL_LINEAR))
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=ALL_LINEAR, task_type=task))
    names = [name for name, module in theirs.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert ours and ours | more == set(names) and not ours & more


def test_all_linear_leaves_heads_out_and_the_plan_says_so() -> None:
    vision = mapsurgery.plan(timm.create_model("vit_tiny_patch16_224", depth=1), ALL_LINEAR)
    assert adapted(vision) == {f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert [skip.path for skip in vision.skipped] == ["head"] and "get_classifier" in str(vision)
    llama = mapsurgery.plan(small_models.llama(), ALL_LINEAR)
    assert [skip.path for skip in llama.skipped] == ["lm_head"] and "get_output_embeddings" in str(llama)
    assert llama.counts == {ALL_LINEAR: 14} and "'all-linear' 14" in str(llama)
    torch_vit = mapsurgery.plan(torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16), ALL_LINEAR)
    assert {layer.path.rpartition(".")[2] for layer in torch_vit.layers} == {"in_proj_weight", "out_proj", "0", "3"}
    assert [skip.path for skip in torch_vit.skipped] == ["heads.head"]


class Tied(nn.Module):
    """No name and no library says which the head is: its weight does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.last = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 8)
        self.last.weight = self.embed.weight


class Holder(nn.Module):
    """As Lightning's module holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()


def test_a_head_is_known_by_its_tie_and_within_what_holds_the_model() -> None:
    assert adapted(mapsurgery.plan(Tied(), ALL_LINEAR)) == {"middle"}
    plain = adapted(mapsurgery.plan(net(), ALL_LINEAR))
    held = mapsurgery.plan(Holder(BertForSequenceClassification(BERT)), ALL_LINEAR)
    assert "head" not in plain and [skip.path for skip in held.skipped] == ["model.classifier"]


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
MLM = {"cls.predictions.transform.dense", "cls.predictions.decoder"}
BESIDE_CORE = [  # models of transformers with heads that no method gives and no name shows
    (lambda: BertForNextSentencePrediction(BERT), {"cls.seq_relationship"}),
    (lambda: BertForPreTraining(BERT), {*MLM, "cls.seq_relationship"}),
    (
        lambda: FNetForPreTraining(
            FNetConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=48)
        ),
        {*MLM, "cls.seq_relationship"},
    ),
    (
        lambda: ElectraForPreTraining(ElectraConfig(vocab_size=64, embedding_size=16, **SMALL)),
        {"discriminator_predictions.dense", "discriminator_predictions.dense_prediction"},
    ),
    (
        lambda: XLMForSequenceClassification(XLMConfig(vocab_size=64, emb_dim=32, n_layers=1, n_heads=2)),
        {"sequence_summary.summary"},
    ),
    (
        lambda: YolosForObjectDetection(YolosConfig(image_size=[32, 32], num_detection_tokens=3, **SMALL)),
        {f"{name}.layers.{i}" for name in ("class_labels_classifier", "bbox_predictor") for i in range(3)},
    ),
]


@pytest.mark.parametrize(("make", "expected"), BESIDE_CORE)
def test_heads_of_transformers_are_what_is_outside_of_the_core(
    make: Callable[[], nn.Module], expected: set[str]
) -> None:
    model = make()
    plan = mapsurgery.plan(model, ALL_LINEAR)
    assert {skip.path for skip in plan.skipped} == expected
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert adapted(plan) == linear - expected and plan.layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.proj = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)]), nn.Linear(8, 8)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)


class Own(nn.Module):
    """Blocks with layers that are called as heads are, and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Attention(), Mlp())
        self.fc, self.cls, self.lm_head = nn.Linear(8, 2), nn.Linear(8, 2), nn.Linear(8, 9)


class Together(nn.Module):
    """Models with a parameter beside them."""

    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        self.sigma = nn.Parameter(torch.zeros(2))
        for name, model in models.items():
            self.add_module(name, model)


OWN = {"fc", "cls", "lm_head"}
IN_OWN = [
    (Mlp, set()),
    (Attention, set()),
    (Own, OWN),
    (lambda: nn.Sequential(nn.Identity(), Own()), {f"1.{name}" for name in OWN}),
    (lambda: nn.ModuleDict({"net": Own(), "crit": nn.Linear(2, 2)}), {f"net.{name}" for name in OWN}),
    (lambda: Together(student=Own(), teacher=Own()), {f"{w}.{name}" for w in ("student", "teacher") for name in OWN}),
    (lambda: Together(net=torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16)), {"net.heads.head"}),
    (lambda: Together(one=BertForSequenceClassification(BERT), head=Mlp()), {"one.classifier", "head.fc", "head.fc2"}),
]


@pytest.mark.parametrize(("make", "expected"), IN_OWN)
def test_heads_have_names_in_a_model_wherever_it_is_held(make: Callable[[], nn.Module], expected: set[str]) -> None:
    model = make()
    plan = mapsurgery.plan(model, ALL_LINEAR)
    assert {skip.path for skip in plan.skipped} == expected
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert linear - expected <= adapted(plan) and not adapted(plan) & expected


def test_all_linear_is_one_entry_among_others() -> None:
    model = small_models.llama()
    plan = mapsurgery.plan(model, [ALL_LINEAR, "lm_head", "*embed_tokens"], exclude="*mlp*")
    attention = {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"}
    assert adapted(plan) == {*attention, "lm_head", "model.embed_tokens"}
    assert mapsurgery.plan(model, ALL_LINEAR, train="lm_head").skipped[0].reason == "trained in full, as `train` asks"
    tied = mapsurgery.plan(small_models.llama(tied=True), [ALL_LINEAR, "*embed_tokens"])
    assert {"lm_head", "model.embed_tokens"} < adapted(tied) and not tied.skipped  # the tie brings the head in


def test_all_linear_takes_quantised_layers() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = small_models.llama()
    quantize_(model, Int8WeightOnlyConfig(version=2))
    plan = mapsurgery.plan(model, ALL_LINEAR)
    assert len(plan.layers) == 14 and all(layer.quantisation is not None for layer in plan.layers)


def test_a_model_without_linear_layers_and_other_spellings_are_refused() -> None:
    with pytest.raises(ValueError, match="'all-linear': the model has no linear layer"):
        mapsurgery.plan(nn.Conv2d(3, 4, 2), ALL_LINEAR)
    with pytest.raises(ValueError, match=r"'all-linear' matches nothing that can be adapted: fc \(Linear\): a head of"):
        mapsurgery.plan(torchvision.models.resnet18(), ALL_LINEAR)
    for wrong in ("all_linear", "All-Linear"):
        with pytest.raises(ValueError, match="write 'all-linear'"):
            mapsurgery.plan(small_models.llama(), wrong)
    with pytest.raises(ValueError, match="exclude pattern 'all-linear' matches no module"):
        mapsurgery.plan(small_models.llama(), "*", exclude=ALL_LINEAR)


def test_an_adapter_of_all_linear_is_saved_and_loads(tmp_path: Path) -> None:
    model = mapsurgery.patch(small_models.llama(), ALL_LINEAR, rank=2)
    for adapter in (m.adapter for m in model.modules() if isinstance(m, mapsurgery.AdaptedLayer)):
        adapter.B.data.normal_()
    mapsurgery.save(model, tmp_path / "a.safetensors")
    loaded = mapsurgery.load(small_models.llama(), tmp_path / "a.safetensors")
    assert torch.equal(small_models.logits(model), small_models.logits(loaded))
    assert not torch.equal(small_models.logits(model), small_models.logits(small_models.llama()))


# Hints ---------------------------------------------------------------------------------------------------------------


def test_a_bare_name_is_answered_with_the_glob_to_write() -> None:
    model = small_models.llama()
    with pytest.raises(ValueError, match=r"'q_proj' matches no module.*layers\.0\.self_attn\.q_proj: write '\*q_proj'"):
        mapsurgery.patch(model, ["q_proj", "v_proj"])
    assert len(mapsurgery.plan(model, "*q_proj").layers) == 2
    with pytest.raises(ValueError, match=r"train pattern 'norm' .* write '\*norm'"):
        mapsurgery.plan(model, "*q_proj", train="norm")


# Forgotten heads -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    BertForMaskedLM(BERT).save_pretrained(folder / "bert")
    small_models.llama().save_pretrained(folder / "llama")
    small_models.llama(tied=True).save_pretrained(folder / "tied")
    vit().save_pretrained(folder / "vit")
    return folder


def forgotten(model: nn.Module, targets: str, **options: object) -> str:
    plan = mapsurgery.plan(model, targets, **options)
    said = "\n".join(filter(None, (plan.warning, plan.advice)))
    assert said in str(plan)
    return said


def test_a_head_that_no_checkpoint_filled_is_noted_and_warned_of(checkpoints: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(checkpoints / "bert")
    said = forgotten(model, "*query")
    assert "bert.pooler.dense and classifier are freshly initialised" in said
    assert 'train=["bert.pooler.dense", "classifier"] trains them' in said
    assert "bert.pooler.dense is freshly" in forgotten(model, "*query", train="classifier")
    assert not forgotten(model, "*query", train=["classifier", "*pooler*"])
    assert not forgotten(model, ["*query", "classifier", "*pooler"])  # adapted: it learns
    with pytest.warns(UserWarning, match="classifier are freshly initialised"):
        mapsurgery.patch(model, "*query")
    score = LlamaForSequenceClassification.from_pretrained(checkpoints / "llama", dtype=torch.bfloat16)
    assert "score is freshly initialised" in forgotten(score.double(), ALL_LINEAR)
    sized = ViTForImageClassification.from_pretrained(checkpoints / "vit", num_labels=7, ignore_mismatched_sizes=True)
    assert "classifier is freshly initialised" in forgotten(sized, "*attention*")


def test_a_layer_that_is_no_head_is_noted_only(checkpoints: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = BertModel.from_pretrained(checkpoints / "bert")
    assert "pooler.dense is freshly initialised" in forgotten(model, "*query")
    mapsurgery.patch(model, "*query")
    assert not [w for w in recwarn if "freshly" in str(w.message)]


def test_what_was_loaded_or_trained_raises_no_alarm(checkpoints: Path) -> None:
    for model, some in (
        *((LlamaForCausalLM.from_pretrained(checkpoints / name), "*self_attn*") for name in ("llama", "tied")),
        (BertForMaskedLM.from_pretrained(checkpoints / "bert"), "*query"),
        (ViTForImageClassification.from_pretrained(checkpoints / "vit"), "*attention*"),
        (BertForSequenceClassification(BERT), "*query"),  # nothing of it was loaded
        (small_models.gpt2(), "*attn*"),
        (net(), "body"),
        (timm.create_model("vit_tiny_patch16_224", depth=1), "*attn*"),
    ):
        assert not forgotten(model, "*") and not forgotten(model, some)
    trained = BertForSequenceClassification.from_pretrained(checkpoints / "bert")
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    for _ in range(3):
        trained(small_models.tokens(), labels=torch.tensor([0, 1])).loss.backward()
        optimiser.step()
    assert not forgotten(trained, "*query")
    loaded = BertForSequenceClassification.from_pretrained(checkpoints / "bert")
    loaded.load_state_dict(trained.state_dict())
    assert not forgotten(loaded, "*query")


def test_a_head_that_was_written_to_without_torch_counting_raises_no_alarm(checkpoints: Path) -> None:
    """The Trainer's default optimiser is a fused one; a zero-shot head is of embeddings."""

    def fused(model: nn.Module) -> None:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        model(small_models.tokens(), labels=torch.tensor([0, 1])).loss.backward()
        optimiser.step()

    def zero_shot(model: nn.Module) -> None:
        model.classifier.weight = nn.Parameter(torch.randn(2, 32))

    def in_place(model: nn.Module) -> None:
        model.classifier.weight.data.copy_(torch.randn(2, 32))

    for write, what in ((fused, ""), (zero_shot, "bert.pooler.dense is"), (in_place, "bert.pooler.dense is")):
        model = BertForSequenceClassification.from_pretrained(checkpoints / "bert")
        write(model)
        assert model.classifier.weight._version <= 1 and "classifier" not in forgotten(model, "*query")
        assert forgotten(model, "*query").startswith(what)
    score = LlamaForSequenceClassification.from_pretrained(checkpoints / "llama")
    score.score.weight.data.mul_(20)  # no bias shows it
    assert not forgotten(score, "*self_attn*")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "efficientnet_lite0"])
def test_a_head_that_timm_made_for_other_classes_is_noted(name: str) -> None:
    model = timm.create_model(name, num_classes=10)
    head = model.get_classifier()
    path = next(path for path, module in model.named_modules() if module is head)
    others = "*conv*" if "vit" not in name else "*attn*"
    assert f"{path} is freshly initialised (its weights come with 1000 classes, and it has 10)" in forgotten(
        model, others
    )
    assert not forgotten(model, others, train=path)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    head(torch.randn(4, head.in_features)).logsumexp(-1).sum().backward()
    optimiser.step()
    assert not forgotten(model, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_new_linear_layer_in_place_of_the_head_is_noted(dtype: torch.dtype) -> None:
    model = torchvision.models.resnet18()
    model.fc = nn.Linear(512, 10)
    model.to(dtype)
    assert "fc is freshly initialised (it holds numbers such as nn.Linear starts with)" in forgotten(model, "layer1")
    assert not forgotten(model, "layer1", train="fc")
    optimiser = torch.optim.AdamW(model.fc.parameters(), lr=1e-3)
    for _ in range(2):
        model.fc(torch.randn(4, 512, dtype=dtype)).logsumexp(-1).sum().backward()
        optimiser.step()
    assert not forgotten(model, "layer1")
    bound = 512**-0.5
    nn.init.trunc_normal_(model.fc.weight, std=bound / 2, a=-bound, b=bound)  # within the bounds, but not even
    nn.init.zeros_(model.fc.bias)
    assert not forgotten(model, "layer1")
    model.fc = nn.utils.parametrizations.weight_norm(nn.Linear(512, 10).to(dtype))  # its numbers are computed
    assert not forgotten(model, "layer1")


def test_a_model_that_nobody_trained_raises_no_alarm() -> None:
    model = nn.Sequential()
    for name, layer in (("body", nn.Linear(32, 32)), ("small", nn.Linear(32, 1)), ("head", nn.Linear(1, 100))):
        model.add_module(name, layer)
    assert not forgotten(model, "body")
    nn.init.normal_(model.body.weight)  # now something was
    assert "head is freshly" in forgotten(model, "body")


# The base again ------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """An adapted layer, and a head, statistics and a recurrent layer that are trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.lstm = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.LSTM(6, 6, batch_first=True)
        self.head, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.head.weight  # tied, and trained

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.body(x))
        return self.again(self.head(self.lstm(h[:, None])[0][:, 0]))


TRAIN = ["head", "again", "norm", "lstm"]


def trained_mixed() -> tuple[Mixed, Mixed, Tensor, torch.optim.Optimizer]:
    """The base, the same patched and trained, an input and the optimiser."""
    torch.manual_seed(3)
    base, x = Mixed(), torch.randn(5, 6)
    model = mapsurgery.patch(copy.deepcopy(base), "body", rank=2, train=TRAIN)
    optimiser = torch.optim.AdamW(mapsurgery.param_groups(model, lr=0.05))
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
    return base.eval(), model.eval(), x, optimiser


def tensors(model: nn.Module) -> list[tuple[str, int, Tensor]]:
    return [(name, id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()]


def same(one: list[tuple[str, int, Tensor]], other: list[tuple[str, int, Tensor]]) -> bool:
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True))


def test_disabled_with_what_was_trained_is_the_base_and_gives_everything_back() -> None:
    base, model, x, optimiser = trained_mixed()
    after, before = model(x), tensors(model)
    with mapsurgery.disabled(model):
        assert not torch.equal(model(x), base(x))  # head, norm and lstm keep what they learned
    with mapsurgery.disabled(model, trained=True):
        assert torch.equal(model(x), base(x))
        assert not any(p.requires_grad for p in model.parameters() if p.shape == (6, 6) and p is model.head.weight)
        with mapsurgery.disabled(model, trained=True), mapsurgery.disabled(model):
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x)) and model.head.weight is model.again.weight
    with pytest.raises(KeyError), mapsurgery.disabled(model, trained=True):
        raise KeyError
    assert same(before, tensors(model)) and torch.equal(model(x), after)
    model(x).sum().backward()
    optimiser.step()
    assert not torch.equal(model(x), after)  # the optimiser holds the very same Parameters
    mapsurgery.unpatch(model)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_blocks_that_overlap_end_with_the_last(trained: bool, first: int) -> None:
    """As those of two threads do."""
    base, model, x, _ = trained_mixed()
    after, before = model(x), tensors(model)
    with mapsurgery.disabled(model):
        off = model(x)
    blocks = [mapsurgery.disabled(model, trained=trained), mapsurgery.disabled(model, trained=trained)]
    for block in blocks:
        block.__enter__()
    blocks[first].__exit__(None, None, None)
    assert torch.equal(model(x), base(x) if trained else off)
    blocks[not first].__exit__(None, None, None)
    assert torch.equal(model(x), after) and same(before, tensors(model))


def test_a_backward_may_cross_the_block() -> None:
    """As in preference training: the policy's forward, the reference's, one backward."""
    base, model, x, _ = trained_mixed()
    with torch.no_grad():
        plain = base(x)
    expected = torch.autograd.grad((model(x) - plain).square().sum(), model.head.weight)
    policy = model(x)
    with mapsurgery.disabled(model, trained=True), torch.no_grad():
        reference = model(x)
    found = torch.autograd.grad((policy - reference).square().sum(), model.head.weight)
    assert torch.equal(found[0], expected[0])


def test_statistics_that_the_block_moves_are_gone_and_those_of_training_are_back() -> None:
    base, model, x, _ = trained_mixed()
    model.train(), base.train()
    before = tensors(model)
    with mapsurgery.disabled(model, trained=True), torch.inference_mode():
        assert torch.equal(model(x), base(x))
        assert torch.equal(model.norm.running_mean, base.norm.running_mean)
    assert same(before, tensors(model))


def test_disabled_with_what_was_trained_after_load_and_under_compile(tmp_path: Path) -> None:
    base, model, x, _ = trained_mixed()
    mapsurgery.save(model, tmp_path / "a.safetensors")
    loaded = mapsurgery.load(copy.deepcopy(base), tmp_path / "a.safetensors").eval()
    compiled = torch.compile(loaded, backend="eager")
    with torch.no_grad():
        for run in (loaded, compiled):
            assert torch.equal(run(x), model(x))
            with mapsurgery.disabled(run, trained=True):
                assert torch.allclose(run(x), base(x), atol=1e-6) if run is compiled else torch.equal(run(x), base(x))
            assert torch.equal(run(x), model(x))


def test_what_cannot_be_the_base_is_refused_and_what_the_block_loses_is_said(tmp_path: Path) -> None:
    _, model, x, _ = trained_mixed()
    with mapsurgery.disabled(model, trained=True):
        for call in (
            lambda: mapsurgery.save(model, tmp_path / "a.safetensors"),
            lambda: mapsurgery.adapter_state_dict(model),
            lambda: mapsurgery.merge(model),
            lambda: mapsurgery.unpatch(model),
        ):
            with pytest.raises(ValueError, match=r"block of mapsurgery\.disabled\(trained=True\)"):
                call()
    state = model.state_dict()
    with pytest.warns(UserWarning, match=r"norm\.bias.* is lost"), mapsurgery.disabled(model, trained=True):
        model.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"head\.weight.* is lost"), mapsurgery.disabled(model, trained=True):
        model.head.weight.data.mul_(2)  # which torch does not count
    mapsurgery.save(model, tmp_path / "a.safetensors")
    model.body.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"body\.bias changed or may learn"), mapsurgery.disabled(model, trained=True):
        pass
    assert torch.isfinite(model(x)).all()
    whole = nn.Sequential(mapsurgery.patch(net(), "body", rank=2), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"1\.weight"), mapsurgery.disabled(whole, trained=True):
        pass


def test_shards_are_refused(tmp_path: Path) -> None:
    _, model, *_ = trained_mixed()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with mapsurgery.disabled(model):
            pass
        with pytest.raises(ValueError, match="is sharded"), mapsurgery.disabled(model, trained=True):
            pass
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


# Reprs and tables ----------------------------------------------------------------------------------------------------


def test_a_repr_is_a_line_and_a_print_a_table() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    plan = mapsurgery.plan(model, "*attn*", train="head*")
    assert len(repr(plan)) < 200 and "\n" not in repr(plan)
    assert repr(plan).startswith("Plan(24 layers with map, trainable: 112,") and "blocks.{0..11}.attn.qkv" in str(plan)
    small = mapsurgery.patch(net(), "body", rank=2)
    tracker = mapsurgery.track(small, every=2)
    for _ in range(3):
        tracker.update()
    verification = mapsurgery.verify(small, image())
    report = mapsurgery.report(train_steps(small, image()))
    assert repr(report).startswith("Report(2 layers, change 0.") and "\n" not in repr(report)
    assert repr(verification) == "Verification(2 of 2 adapters act on the output and learn)"
    assert repr(tracker) == "Tracker(2 records, every 2 steps, of 2 layers)"
    assert repr(tracker.history).startswith("History(2 steps, 0 to 2; 2 layers; weight_norm, ")


LONG = Table(
    "a title",
    ["layer", "n", "rank", "effective_rank", "notes"],
    [
        ["blocks.{0..11}.attn[0].a_very_long_name_of_a_layer.qkv", 1200, 8, 0.00012345, "own forward; no dropout " * 4],
        ["b", 1, 8, 1.5, ""],
    ],
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], Callable[[], str]]]:
    """`terminal("stdout", 80)`: lets the stream lead to a pseudo-terminal of that width; what was written is read."""
    monkeypatch.delenv("COLUMNS", raising=False)
    opened = []

    def begin(stream: str, width: int) -> Callable[[], str]:
        master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        os.set_blocking(master, False)
        out = os.fdopen(slave, "w")
        opened.append((master, out))
        monkeypatch.setattr(sys, stream, out)
        monkeypatch.setattr(sys, f"__{stream}__", out)

        def written() -> str:
            out.flush()
            found = b""
            while True:
                try:
                    found += os.read(master, 1 << 16)
                except BlockingIOError:
                    return found.decode()

        return written

    yield begin
    for master, out in opened:
        out.close()
        os.close(master)


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("width", [35, 60, 80, 120])
def test_a_table_fits_the_terminal_and_loses_nothing(
    width: int, rich: bool, terminal: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    whole = str(LONG)
    written = terminal("stdout", width)
    print(LONG)
    monkeypatch.undo()
    text = written()
    lines = text.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= width < max(map(len, whole.splitlines()))
    joined = "".join(text.split())
    for piece in ("0.0001234", "1,200", "1.5", "a title".replace(" ", "")):
        assert piece in joined
    for value in (LONG.rows[0][0], "own forward; no dropout"):
        assert all(char in joined for char in "".join(value.split()))
    notes = [word for word in text.split() if word in ("own", "forward;", "no", "dropout")]
    assert notes == ["own", "forward;", "no", "dropout"] * 4


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("width", [None, 30])
def test_a_table_shows_wide_and_dangerous_characters(
    rich: bool, width: int | None, terminal: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide ones take two places, combining ones none; what acts on a terminal is shown as Python writes it."""
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    if width:
        terminal("stdout", width)
    rows = [["層の名前" * 2, 1], ["e\u0301", 2], ["\x1b[31mred\x1b[0m\n\u202e", 3]]
    text = tables.render("t\x1b]0;title\a", ["層", "n"], rows, "one two three four five six seven\nand \x1b[2J")
    assert not any(char in text for char in "\x1b\u202e\a") and r"t\x1b]0;title\x07" in text.splitlines()[0]
    assert r"\x1b[31mred\x1b[0m\n\u202e" in "".join(text.split()) or rich and width
    ends = [cell_len(line) for line in text.splitlines() if line.endswith((" 1", " 2", " 3"))]
    assert len(ends) == 3 and len(set(ends)) == 1
    assert text.splitlines()[-1] == r"and \x1b[2J"
    assert max(map(cell_len, text.splitlines())) <= (width or 60)
    html = Table("\x1b", ["\x1b"], [["\x1b"]]).html()
    assert html.count(r"\x1b") == 3 and "\x1b" not in html


def test_columns_says_the_width_of_a_terminal_and_a_pipe_has_none(
    terminal: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    print(LONG)
    assert LONG.rows[0][0] in capsys.readouterr().out  # whole, in a line
    terminal("stdout", 200)
    assert max(map(len, str(LONG).splitlines())) <= 70


# Progress ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAPSURGERY_PROGRESS", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(progress_module, "_PATIENCE", -1.0)


def _life(tmp_path: Path) -> None:
    model = mapsurgery.patch(small_models.llama(), ALL_LINEAR, rank=2)
    mapsurgery.report(model)
    mapsurgery.save(model, tmp_path / "a.safetensors")
    mapsurgery.load(small_models.llama(), tmp_path / "a.safetensors")
    mapsurgery.unmerge(mapsurgery.merge(model))


def test_long_work_shows_a_bar_and_takes_it_away(tmp_path: Path, terminal: Callable, impatient: None) -> None:
    written = terminal("stderr", 100)
    _life(tmp_path)
    text = written()
    for what in ("planning", "making adapters", "measuring", "reading norms", "comparing the base", "writing weights"):
        assert f"mapsurgery: {what}:" in text
    assert "14/14" not in text.rpartition("\r")[2] and "\n" not in text and not text.rpartition("\r")[2].strip()


def test_quick_work_pipes_other_processes_and_the_switch_show_none(
    tmp_path: Path, terminal: Callable, impatient: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    _life(tmp_path)
    assert capfd.readouterr().err == ""  # no terminal
    written, model = terminal("stderr", 100), net()
    for name, value in (("MAPSURGERY_PROGRESS", "0"), ("RANK", "1")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            mapsurgery.plan(model, "*")
    assert written() == ""
    mapsurgery.plan(model, "*")
    assert "planning" in written()
    monkeypatch.setattr(progress_module, "_PATIENCE", 60.0)
    mapsurgery.plan(model, "*")
    assert written() == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_leaves_the_terminal_clean(
    error: type[BaseException], terminal: Callable, impatient: None
) -> None:
    written = terminal("stderr", 100)
    with pytest.raises(error):
        for i in progress_module.progress(range(9), "counting"):
            if i == 4:
                raise error
    text = written()
    assert "counting" in text and not text.rpartition("\r")[2].strip()


# Completion ----------------------------------------------------------------------------------------------------------

_COMPLETION = """
import sys, mapsurgery
heavy = {"transformers", "peft", "accelerate", "timm", "trl", "diffusers", "lightning", "rich", "matplotlib", "IPython"}
mapsurgery.plots.heat_map
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert not [name for name in sys.modules if name.startswith("mapsurgery.integrations.")]
from rlcompleter import Completer
found = Completer({"mapsurgery": mapsurgery}).attr_matches("mapsurgery.")
names = {name.removeprefix("mapsurgery.").rstrip("()") for name in found}
assert names == {*mapsurgery.__all__}, names ^ {*mapsurgery.__all__}
assert {"patch", "plots", "integrations", "contrib"} <= names and "__version__" in dir(mapsurgery)
sys.modules["transformers"] = None
try:
    mapsurgery.integrations.transformers
except AttributeError as error:
    assert "needs the package 'transformers', which is not installed: pip install transformers" in str(error), error
else:
    raise AssertionError
assert not hasattr(mapsurgery.integrations, "transformers")
assert mapsurgery.integrations.peft.load_peft
assert {"peft", "transformers"} <= {*dir(mapsurgery.integrations)} and "importlib" not in dir(mapsurgery.integrations)
print("done")
"""


def test_completion_shows_the_api_and_imports_no_other_library() -> None:
    run = subprocess.run([sys.executable, "-c", _COMPLETION], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.strip() == "done", run.stderr
