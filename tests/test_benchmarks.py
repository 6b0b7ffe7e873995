"""The benchmarks run, on tiny shapes, and write what they promise. No time is a pass condition."""

import argparse
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def keep_torch_settings(monkeypatch):
    """The scripts import their neighbours, and change torch's random numbers and TF32 settings."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with torch.random.fork_rng():
        yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def results(folder: Path) -> list[dict]:
    """Rows of the one set of result files in a folder; checks that the three formats agree."""
    (data,) = folder.glob("*.json")
    content = json.loads(data.read_text())
    with data.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    markdown = data.with_suffix(".md").read_text()
    assert len(table) == len(content["rows"]) > 0
    assert {"device_name", "torch", "mapsurgery", "kernels", "threads", "date", "command"} <= content["run"].keys()
    assert content["run"]["kernels"] in markdown
    return content["rows"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "autocast-bf16"])
def test_train_step(tmp_path, dtype):
    pytest.importorskip("timm")
    pytest.importorskip("peft")
    import train_step

    options = ["--models", "vit_test", "--dtype", dtype, "--repeats", "2", "--warmup", "0", "--rank", "2"]
    assert train_step.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in results(tmp_path)}
    assert list(rows) == train_step.default_methods(dtype)
    assert {(row["batch"], row["size"]) for row in rows.values()} == {(2, 32)}
    assert all(math.isfinite(row["step_ms"]) and math.isfinite(row["loss"]) for row in rows.values())
    assert rows["lora"]["time_to_lora"] == rows["frozen"]["time_to_frozen"] == 1
    assert rows["map"]["trained"] == rows["map-plain"]["trained"] > rows["lora"]["trained"]  # two magnitudes per layer
    assert rows["map"]["saved_bytes"] < rows["map-plain"]["saved_bytes"]
    assert all(row["peak_bytes"] is None for row in rows.values())


def test_train_step_takes_batch_and_size_with_the_model(tmp_path, capsys):
    import train_step

    assert train_step.Model.parse("llama_8b:8x1024") == train_step.Model("llama_8b", 8, 1024)
    assert train_step.Model.parse("vit_base:64") == train_step.Model("vit_base", 64)
    for wrong, word in (("vit_bose", "vit_base"), ("vit_base:", "vit_base:"), ("vit_base:0", "BATCHxSIZE")):
        with pytest.raises(SystemExit):
            train_step.main(["--models", wrong, "--out", str(tmp_path)])
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("model", ["llama_test", "resnet_test"])
def test_train_step_other_models(tmp_path, model):
    pytest.importorskip("transformers" if model == "llama_test" else "timm")
    import train_step

    options = ["--models", model, "--methods", "frozen", "map", "map-plain", "--repeats", "1", "--warmup", "0"]
    assert train_step.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert [row["time_to_lora"] for row in results(tmp_path)] == [None] * 3


def test_checkpointing_saves_less(tmp_path):
    pytest.importorskip("timm")
    import train_step

    saved = []
    for extra in ([], ["--checkpoint"]):
        folder = tmp_path / str(len(extra))
        options = ["--models", "vit_test", "--methods", "map", "--repeats", "1", "--warmup", "0", *extra]
        assert train_step.main([*options, "--device", "cpu", "--out", str(folder)]) == 0
        saved.append(results(folder)[0]["saved_bytes"])
    assert 0 < saved[1] < saved[0]


def test_frozen_is_the_base_and_shares_its_weights():
    pytest.importorskip("timm")
    import train_step

    workload = train_step.WORKLOADS["vit_test"]
    base = train_step.make_base(workload, 32, "fp32", torch.device("cpu"))
    x = torch.randn(2, 3, 32, 32)
    for name in ("frozen", "lora", "map"):
        if name == "lora":
            pytest.importorskip("peft")
        model = train_step.METHODS[name](train_step.share_weights(base), workload.targets(base), 2)
        own = {parameter.data_ptr() for parameter in model.parameters()}
        assert all(parameter.data_ptr() in own for parameter in base.parameters())
        torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_plain_map_is_map(kind):
    import train_step

    from mapsurgery import ops

    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5) if kind == "linear" else torch.nn.Conv2d(3, 5, 3, padding=1, stride=2)
    x = torch.randn(4, 6) if kind == "linear" else torch.randn(2, 3, 7, 7)
    plain = train_step.PlainMap(layer.requires_grad_(False), 2)
    with torch.no_grad():
        plain.beta.fill_(0.7)
        weight = layer.weight.flatten(1)
        norm = torch.tensor([ops.frobenius_norm(weight)])
        scales = ops.map_scales(plain.A, plain.B, plain.alpha - norm, plain.beta, norm, relative=False)
        expected = ops.effective_weight(weight, plain.A, plain.B, *scales)
        got = plain(x)
        layer.weight.copy_(expected.reshape(layer.weight.shape))
    torch.testing.assert_close(got, layer(x))


def test_a_failing_method_is_reported(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    import train_step

    def broken(model, targets, rank):
        raise RuntimeError("broken on purpose")

    monkeypatch.setitem(train_step.METHODS, "dora", broken)
    options = ["--models", "vit_test", "--methods", "dora", "map", "--repeats", "1", "--warmup", "0"]
    assert train_step.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "broken on purpose" in capsys.readouterr().err
    errors = {row["method"]: row["error"] for row in results(tmp_path)}
    assert errors == {"map": None, "dora": "RuntimeError: broken on purpose"}


def test_products(tmp_path):
    import products

    options = ["--tokens", "3", "--widths", "16", "8", "--dtype", "bf16", "fp32", "--repeats", "2", "--rank", "2"]
    assert products.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = results(tmp_path)
    assert {(row["in"], row["out"]) for row in rows} == {(16, 8), (2, 8)}
    assert all(row["to_mm"] == 1 for row in rows if row["way"] == products.FLOOR)
    assert all(row["us"] > 0 and row["relative_error"] < 0.03 for row in rows)


def test_launches(tmp_path):
    pytest.importorskip("peft")
    import launches

    assert launches.main(["--width", "64", "--tokens", "4", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = {(row["layer"], row["method"]): row for row in results(tmp_path)}
    assert rows.keys() == {(layer, method) for layer in launches.LAYERS for method in launches.CHOICES}
    assert "1 x mapsurgery::lowrank_linear_backward" in rows["Linear", "map"]["names"]
    assert all(
        rows["Linear", "frozen"]["launches"] < row["launches"] for (_, name), row in rows.items() if name == "dora"
    )


def test_reuse_norms(tmp_path):
    pytest.importorskip("peft")
    import reuse_norms

    shape = ["--widths", "8", "--ranks", "2", "16", "--layers", "2", "--tokens", "3", "--micro-batches", "1", "2"]
    options = [*shape, "--tokens-of-a-loop", "2", "--repeats", "2", "--min-ms", "0"]
    assert reuse_norms.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = results(tmp_path)
    assert {row["rank"] for row in rows} == {2}
    assert [row["quantity"] for row in rows[:: len(reuse_norms.METHODS)]] == ["step of 1", "step of 2", "decode"]
    assert all(math.isfinite(row["ms"]) and row["rounds"] == 2 for row in rows)
    assert all(row["to_lora"] == 1 for row in rows if row["method"] == "lora")


@pytest.mark.parametrize(
    "dtype, operators", [pytest.param("fp32", None, marks=pytest.mark.long), ("bf16", ["lowrank_linear", "map_linear"])]
)
def test_ops(tmp_path, dtype, operators):
    import ops

    operators = operators or ops.OPERATORS
    options = ["--size", "tiny", "--repeats", "1", "--min-ms", "0", "--dtype", dtype, "--operators", *operators]
    options += ["--implementations", "op", "autograd", "reference", "base"]
    assert ops.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = results(tmp_path)
    assert {row["operator"].split()[0] for row in rows} == set(operators)
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in rows)
    checked = [row for row in rows if row["implementation"] in ("op", "reference")]
    assert all(row["relative_error"] < 0.03 for row in checked)


@pytest.mark.slow
@pytest.mark.long
def test_ops_compiled(tmp_path):
    import ops

    options = ["--size", "tiny", "--repeats", "1", "--min-ms", "0", "--operators", "map_linear"]
    options += ["--implementations", "op", "compiled"]
    config = torch._dynamo.config
    with config.patch(recompile_limit=config.recompile_limit, fail_on_recompile_limit_hit=False):
        assert ops.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert {row["implementation"] for row in results(tmp_path)} == {"op", "compiled"}


def test_floor(tmp_path):
    pytest.importorskip("peft")
    import floor

    assert floor.main(["--shapes", "test", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in results(tmp_path)}
    assert list(rows) == ["frozen", "lora", "map"]
    assert all(row["ms"] > 0 and row["predicted_ms"] > 0 for row in rows.values())
    assert rows["frozen"]["mib"] < rows["map"]["mib"] < rows["lora"]["mib"]  # fewer passes than peft's LoRA


def test_a_wrong_operator_is_not_timed(tmp_path, monkeypatch):
    import ops

    def slightly_wrong(weight, *args):
        ops.OPS.merge_.default(weight, *args)
        weight.mul_(1.1)

    cases = ops.weight_cases(8, 6, 2, torch.float32, torch.device("cpu"))
    case = cases["merge_"]
    case.implementations["op"] = ops.in_place(slightly_wrong)
    with pytest.raises(RuntimeError, match="wrong results"):
        ops.check(case, ops.functions_of(case, ["op", "reference"]))


@pytest.mark.parametrize("norm", [False, True])
def test_cost_of_a_linear_forward(norm):
    """Floors rest on these counts: 2 T m K for the layer, 2 T r (m + K) for the update, Gram matrices for a norm."""
    import ops

    T, m, K, r = 10, 7, 5, 2
    cases = ops.linear_cases(T, m, K, r, norm, torch.float32, torch.device("cpu"))
    (cost,) = cases["map_linear" if norm else "lowrank_linear"].costs
    assert cost.flops == 2 * T * m * K + 2 * T * r * (m + K) + norm * 2 * r * r * (m + K)
    assert cost.bytes == 4 * (T * K + m * K + m + T * m + T * r + r * (m + K))


def test_scaling(tmp_path):
    pytest.importorskip("peft")
    import scaling

    options = ["--size", "tiny", "--repeats", "2", "--min-ms", "0", "--curves", "rank", "layers", "--device", "cpu"]
    folder, plots = tmp_path / "results", tmp_path / "plots"
    assert scaling.main([*options, "--out", str(folder), "--plots", str(plots)]) == 0
    rows = results(folder)
    points = scaling.curves(torch.device("cpu"), tiny=True)
    for curve in ("rank", "layers"):
        found = [row for row in rows if row["curve"] == curve]
        assert [row["method"] for row in found[:4]] == ["frozen", "lora", "dora", "map"]
        assert len(found) == 4 * len(scaling.QUANTITIES) * len(points[curve])
        assert {row[curve] for row in found} == {getattr(point, curve) for point in points[curve]}
    assert all(row["ms"] > 0 and row["processor_ms"] > 0 and row["rounds"] == 2 for row in rows)
    assert all(row["to_lora_q1"] <= row["to_lora"] <= row["to_lora_q3"] for row in rows)
    assert {row["to_lora"] for row in rows if row["method"] == "lora"} == {1.0}
    assert {row["to_frozen"] for row in rows if row["method"] == "frozen"} == {1.0}


def test_scaling_covers_what_it_promises():
    import scaling

    for device in ("cpu", "cuda"):
        points = scaling.curves(torch.device(device), tiny=False)
        rank = [point.rank for point in points["rank"]]
        width = points["rank"][0].width
        assert {1, 4, 8, 16, 64, 256} <= set(rank) and sum(r > width / 2 for r in rank) == 2 and max(rank) == width
        assert [point.tokens for point in points["tokens"]] == [2**i for i in range(13)]
        assert [point.width for point in points["width"]] == [2**i for i in range(6, 13)]
        assert [point.layers for point in points["layers"]] == [2**i for i in range(7)]


def test_scaling_ends_a_curve_that_takes_too_long(tmp_path, capsys):
    import scaling

    options = ["--size", "tiny", "--min-ms", "0", "--methods", "frozen", "map", "--curves", "tokens", "--device", "cpu"]
    options += ["--point-seconds", "0", "--out", str(tmp_path), "--plots", str(tmp_path)]
    assert scaling.main(options) == 0
    rows = results(tmp_path)
    assert {(row["tokens"], row["rounds"]) for row in rows} == {(1, scaling.FEWEST_ROUNDS)}
    (markdown,) = tmp_path.glob("*.md")
    message = "The curve over tokens in fp32 ends at 1"
    assert message in capsys.readouterr().out and message in markdown.read_text()


SCALING_CSV = """\
curve,dtype,device,tokens,width,rank,layers,quantity,method,to_lora,to_lora_q1,to_lora_q3,lora,error,device_name,torch
rank,fp32,cpu,256,256,1,1,train,lora,1,1,1,lora,,Some CPU,2.14
rank,fp32,cpu,256,256,1,1,train,map,1.1,1.0,1.2,lora,,Some CPU,2.14
rank,fp32,cpu,256,256,2,1,train,map,0.9,,,lora,,Some CPU,2.14
rank,fp32,cpu,256,256,2,1,,dora,,,,,RuntimeError: failed,Some CPU,2.14
width,bf16,cpu,256,64,8,1,eval,map,1.2,1.1,1.3,lora-bf16,,Some CPU,2.14
"""


def test_scaling_plots_come_from_a_csv(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    import scaling

    path = tmp_path / "numbers.csv"
    path.write_text(SCALING_CSV)
    assert scaling.main(["--plot-only", str(path), "--plots", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    expected = {"scaling_rank_cpu.png", "scaling_width_cpu_bf16.png"}
    assert {found.name for found in tmp_path.glob("*.png")} == expected
    assert all(f"wrote {tmp_path / name}" in printed for name in expected)
    for name in expected:
        assert (tmp_path / name).stat().st_size < 100_000
        with image.open(tmp_path / name) as picture:
            assert picture.width > 600 and len(picture.getcolors(1 << 20)) > 20


@pytest.mark.parametrize("content", [None, "a,b\n1,2\n", ""])
def test_scaling_refuses_to_plot_another_file(tmp_path, content):
    import scaling

    path = tmp_path / "numbers.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"numbers\.csv"):
        scaling.main(["--plot-only", str(path), "--plots", str(tmp_path)])


def test_scaling_without_matplotlib(tmp_path, monkeypatch):
    import scaling

    path = tmp_path / "numbers.csv"
    path.write_text(SCALING_CSV)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install matplotlib, or mapsurgery\[plots\]"):
        scaling.main(["--plot-only", str(path), "--plots", str(tmp_path)])


def test_tracking(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("peft")
    import tracking

    options = ["--models", "vit_test", "--repeats", "2", "--rank", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert tracking.main(options) == 0
    rows = {row["variant"]: row for row in results(tmp_path)}
    assert list(rows) == list(tracking.VARIANTS)
    assert rows["no tracker"]["to_plain"] == 1 and {row["layers"] for row in rows.values()} == {8}
    assert all(row["step_ms"] > row["update_ms"] >= 0 and row["percent_100"] >= 0 for row in rows.values())


def test_checks(tmp_path):
    import checks

    options = ["--mib", "1", "--width", "16", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert checks.main(options) == 0
    rows = results(tmp_path)
    assert {row["what"] for row in rows} == {*checks.HASHES, "norm", "fingerprint"} and len(rows) == 9
    assert all(row["ms"] > 0 and row["gbs"] > 0 for row in rows)
    assert all(row["to_first"] == 1 for row in rows if row["what"] in ("sha256", "norm"))


@pytest.mark.long
def test_surgery(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    import surgery

    assert surgery.main(["--size", "small", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = results(tmp_path)
    layers = len(surgery.adapted_layers(surgery.meta_llama("small", torch.bfloat16)))
    whole = {(row["operation"], row["method"]): row for row in rows if "of_memory" in row or "peak_mib" in row}
    both = {(name, method) for name in ("patch", "merge", "unmerge") for method in ("lora", "dora", "map")}
    assert whole.keys() == both | {(name, "map") for name in ("save", "unpatch", "load")}
    assert all(row["ms"] > 0 and row["layers"] == layers for row in whole.values())
    passed = {name for (name, method), row in whole.items() if method == "map" and row.get("gbs")}
    assert passed == {"patch", "load", "merge", "unmerge"}
    files = [row for row in rows if row.get("file_bytes")]
    assert len(files) == 2 * len(surgery.file_settings(4))
    assert all(
        4 * row["parameters"] < row["file_bytes"] < 4 * row["parameters"] + 2000 * row["layers"] for row in files
    )
    meta = [row for row in rows if row["operation"] == "patch of small on meta"]
    assert [row["method"] for row in meta] == ["lora", "dora", "map"]
    assert meta[2]["parameters"] == meta[0]["parameters"] + 2 * layers  # two magnitudes per layer


def test_surgery_leaves_the_model_as_it_was(tmp_path):
    import surgery

    pytest.importorskip("transformers")
    device = torch.device("cpu")
    base = surgery.random_llama("small", torch.float32, device)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    operations = surgery.Operations(base, 2, tmp_path, device)
    operations.round(["map"])
    after = base.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_peak_memory():
    import surgery

    device = torch.device("cpu")
    before = surgery.start_peak(device)
    if before is None:
        pytest.skip("this system does not let a process reset its peak")
    held = torch.ones(25 << 20)  # 100 MiB
    del held
    assert 98 < surgery.peak_since(before, device) / surgery.MIB < 150  # the kernel counts in batches of pages
    before = surgery.start_peak(device)
    assert surgery.peak_since(before, device) / surgery.MIB < 50


AB_CASES = ("linear:2x16/r2/fp32/train/map", "linear:2x16/r2/autocast-bf16/no_grad/lora", "vit_test/r2/fp32/train/map")


@pytest.mark.long
def test_ab(tmp_path, capsys):
    """The same checkout twice, in processes of their own; a case that fails is told, and the others count."""
    pytest.importorskip("timm")
    pytest.importorskip("peft")
    import ab

    failing = "linear:2x16/r2/fp32/train/nothing"
    cases = [failing, *AB_CASES]
    options = ["--extra", *cases, "--rounds", "2", "--processes", "1", "--threads", "1", "--device", "cpu"]
    root = str(BENCHMARKS.parent)
    assert ab.main([root, root, *options, "--out", str(tmp_path)]) == 1
    rows = results(tmp_path)
    assert [str(ab.Case(*(row[key] for key in vars(ab.Case.parse(failing))))) for row in rows] == cases
    assert "nothing" in rows[0]["error"] and failing in capsys.readouterr().err
    assert all(row["b_to_a"] > 0 and row["rounds"] == 2 and row["error"] is None for row in rows[1:])
    assert rows[1]["a_to_peft"] > 0
    assert root not in next(tmp_path.glob("*.json")).read_text()


def test_ab_exits_with_0_where_no_case_fails(tmp_path, monkeypatch):
    import ab

    worker = SimpleNamespace(ask=lambda *_: {"ms": 1.0, "processor_ms": 1.0}, hello={"threads": 1})
    worker.hello |= {"kernels": "native", "native": {}}
    monkeypatch.setattr(ab, "running", lambda checkouts, *_: nullcontext(dict.fromkeys(checkouts, worker)))
    root = str(BENCHMARKS.parent)
    options = ["--extra", AB_CASES[0], "--rounds", "2", "--processes", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert ab.main([root, root, *options]) == 0
    assert results(tmp_path)[0]["b_to_a"] == 1


def test_ab_refuses_what_it_cannot_measure(tmp_path, capsys):
    import ab

    root = str(BENCHMARKS.parent)
    with pytest.raises(SystemExit):
        ab.main([root, str(tmp_path)])
    assert "no checkout" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"no such\*.*\n.*linear:1x768/r8/fp32/train/map"):
        ab.main([root, root, "--cases", "no such*"])
    for wrong in ("linear:2x16/r2/fp32/train", "linear:2/r2/fp32/train/map", "vit_test/2/fp32/train/map"):
        with pytest.raises(SystemExit):
            ab.main([root, root, "--extra", wrong])
        assert wrong in capsys.readouterr().err


def test_ab_steps_move_the_scalars():
    """The next call never sees the numbers of the one before."""
    import ab_worker

    subject = ab_worker.Subject(ab_worker.Case.parse(AB_CASES[0]), torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in subject.trained.items()}
    subject.measure(1)
    assert len(before) == 4 and all(not before[name].equal(parameter) for name, parameter in subject.trained.items())


def test_whole_steps_move_the_scalars():
    pytest.importorskip("timm")
    import train_step

    workload = train_step.WORKLOADS["vit_test"]
    base = train_step.make_base(workload, 32, "fp32", torch.device("cpu"))
    arguments = argparse.Namespace(rank=2, checkpoint=False, compile=False)
    loss = workload.data(2, 32, torch.float32, torch.device("cpu"))
    candidate = train_step.make_candidate("map", base, workload, loss, "fp32", arguments)
    candidate.step()
    before = {name: parameter.detach().clone() for name, parameter in candidate.trained().items()}
    candidate.measure(1)
    assert not any(before[name].equal(parameter) for name, parameter in candidate.trained().items())


def test_scaling_moves_the_scalars():
    pytest.importorskip("peft")
    import scaling

    candidate = scaling.make_candidate(
        "map", *scaling.make_base(scaling.Point(2, 8, 2, 1), "fp32", torch.device("cpu")), 2
    )
    trained = [parameter for parameter in candidate.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    candidate.time("train", 2)
    assert not any(old.equal(new) for old, new in zip(before, trained, strict=True))


@pytest.mark.long
def test_calls(capsys):
    import calls

    assert calls.main([str(BENCHMARKS.parent)]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    counts = {what: list(map(int, numbers)) for what, *numbers in lines}
    # Calls of torch's functions depend on what ran before in the process.
    own = {what: [found["library"], found["files"]] for what, found in calls.all_counts().items()}
    assert {what: numbers[:2] for what, numbers in counts.items()} == own
    before, whole = (counts[f"forward{part}, training"] for part in (" before C++", ""))
    assert 1 <= before[0] <= whole[0] and 1 <= before[1] <= before[0] <= before[2]
    assert calls.main(["--list"]) == 0
    assert "-- C++ --" in capsys.readouterr().out


def test_statistics():
    import common

    assert common.median([3.0, 1.0, 2.0]) == 2.0
    assert common.iqr([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert math.isnan(common.iqr([1.0])) and math.isnan(common.median([]))
    assert common.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == 2.0


def start_gpu_all(folder: Path, *stages: str, **environment: str) -> subprocess.Popen:
    """benchmarks/gpu_all.sh on the CPU."""
    variables = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "OUT": str(folder), **environment}
    variables["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    command = ["bash", str(BENCHMARKS / "gpu_all.sh"), *stages]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    # A process that was started in the background ignores Ctrl-C, and hands that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=variables, text=True, cwd=folder.parent, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def run_gpu_all(folder: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess:
    """The same, to its end."""
    script = start_gpu_all(folder, *stages, **environment)
    stdout, stderr = script.communicate(timeout=300)
    return subprocess.CompletedProcess(script.args, script.returncode, stdout, stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
def test_gpu_all(tmp_path):
    """A stage out of time does not stop the next one; both outcomes are told, last of all."""
    done = run_gpu_all(tmp_path / "out", "ops", "info", LIMIT_ops="0.01", LIMIT_info="200")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    first, second = summary.splitlines()
    assert "OUT OF TIME" in first and "exit code 124" in first
    assert second.startswith("info") and " ok " in second
    assert "version" in (tmp_path / "out" / "log.txt").read_text()


STUB = """#!/usr/bin/env bash
# Stands for Python and for what a GPU machine has: says what it was called with, and leaves the files of a benchmark.
echo "called: $*"
while [[ $# -gt 1 ]]; do
    [[ $1 == --out ]] && touch "$2/a.csv" "$2/a.json" "$2/a.md"
    shift
done
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
@pytest.mark.parametrize(
    "command, stages",
    [
        ("first", "install info kernels fuzz products launches train"),
        ("second", "install failed cuda_tests memcheck racecheck compiled ops"),
    ],
)
def test_gpu_all_fits_two_commands(tmp_path, command, stages):
    """Most valuable first, 400 seconds each, and few files: a machine with a GPU may be lent for minutes only."""
    for name in ("python", "compute-sanitizer", "nvidia-smi"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    out = tmp_path / "out"
    done = run_gpu_all(out, command, DEVICE="cuda", PYTHON=str(tmp_path / "python"), PATH=path, PACK="1", PREBUILT="1")
    assert done.returncode == 0, done.stdout
    started = re.findall(r"^=== (\w+) \(at most (\d+) s\)$", done.stdout, re.MULTILINE)
    assert [stage for stage, _ in started] == stages.split()
    assert sum(int(limit) for _, limit in started) <= 400
    assert len(list(out.iterdir())) <= 8
    with tarfile.open(out / "results.tar.gz") as packed:
        assert {Path(name).name for name in packed.getnames()} >= {"a.csv", "a.json", "a.md"}
    assert json.loads((out / "failed.json").read_text()) == {}
    if command == "second":
        assert "--tool racecheck --kernel-name kns=mapsurgery" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
@pytest.mark.parametrize("what", ["a stage that hangs", "Ctrl-C", "no time left"])
def test_gpu_all_ends_in_time(tmp_path, what):
    """What hangs is ended, Ctrl-C ends everything, and the stages share one total; each is told in the summary."""
    hang = "#!/usr/bin/env bash\ntrap 'echo asked to stop; exit 7' INT\necho started\nwhile true; do sleep 0.1; done\n"
    (tmp_path / "python").write_text(hang)
    (tmp_path / "python").chmod(0o755)
    settings = {
        "a stage that hangs": {"LIMIT_info": "1", "LIMIT_fuzz": "1"},
        "Ctrl-C": {},
        "no time left": {"TOTAL": "10"},  # less than a stage that hangs may take to end
    }[what]
    out = tmp_path / "out"
    script = start_gpu_all(out, "info", "fuzz", PYTHON=str(tmp_path / "python"), **settings)
    if what == "Ctrl-C":
        while not (out / "log.txt").exists() or "started" not in (out / "log.txt").read_text():
            time.sleep(0.05)
        script.send_signal(signal.SIGINT)
    printed, _ = script.communicate(timeout=60)
    outcomes = {
        "a stage that hangs": ["info OUT OF TIME exit code 124", "fuzz OUT OF TIME exit code 124"],
        "Ctrl-C": ["info INTERRUPTED exit code 130", "fuzz NOT RUN"],
        "no time left": ["info NOT RUN", "fuzz NOT RUN"],
    }[what]
    summary = (out / "summary.txt").read_text()
    assert printed.endswith(summary) and script.returncode == (130 if what == "Ctrl-C" else 1)
    for line, outcome in zip(summary.splitlines(), outcomes, strict=True):
        assert " ".join(line.split()).startswith(outcome)
    assert printed.count("asked to stop") == {"a stage that hangs": 2, "Ctrl-C": 1, "no time left": 0}[what]


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
def test_gpu_all_refuses_unknown_stages(tmp_path):
    done = run_gpu_all(tmp_path / "out", "info", "everything")
    assert done.returncode == 2 and "everything" in done.stderr
    assert not (tmp_path / "out").exists()
