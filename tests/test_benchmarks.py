"""The benchmarks run, on tiny shapes, and write what they promise. No time is a pass condition."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

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
    assert all(math.isfinite(row["step_ms"]) and math.isfinite(row["loss"]) for row in rows.values())
    assert rows["lora"]["time_to_lora"] == rows["frozen"]["time_to_frozen"] == 1
    assert rows["map"]["trained"] == rows["map-plain"]["trained"] > rows["lora"]["trained"]  # two magnitudes per layer
    assert rows["map"]["saved_bytes"] < rows["map-plain"]["saved_bytes"]
    assert all(row["peak_bytes"] is None for row in rows.values())


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
        expected = ops.effective_weight(weight, plain.A, plain.B, plain.alpha, plain.beta, norm, 0.0, False)
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


@pytest.mark.parametrize("dtype, operators", [("fp32", None), ("bf16", ["map_linear"])])
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


def test_cost_of_a_linear_forward():
    """Floors rest on these counts: 2 T m K for the layer, and 2 T r (m + K) for the update, plus the Gram matrices."""
    import ops

    T, m, K, r = 10, 7, 5, 2
    (cost,) = ops.linear_cases(T, m, K, r, torch.float32, torch.device("cpu"))["map_linear"].costs
    assert cost.flops == 2 * T * m * K + 2 * T * r * (m + K) + 2 * r * r * (m + K)
    assert cost.bytes == 4 * (T * K + m * K + m + T * m + T * r + r * (m + K))


def test_statistics():
    import common

    assert common.median([3.0, 1.0, 2.0]) == 2.0
    assert common.iqr([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert math.isnan(common.iqr([1.0])) and math.isnan(common.median([]))
    assert common.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == 2.0


def run_gpu_all(folder: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess:
    """benchmarks/gpu_all.sh on the CPU."""
    variables = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "OUT": str(folder), **environment}
    variables["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    command = ["bash", str(BENCHMARKS / "gpu_all.sh"), *stages]
    return subprocess.run(command, env=variables, capture_output=True, text=True, cwd=folder.parent, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
def test_gpu_all(tmp_path):
    """A stage out of time does not stop the next one; both outcomes are told, last of all."""
    done = run_gpu_all(tmp_path / "out", STAGES="ops info", LIMIT_ops="0.01")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    first, second = summary.splitlines()
    assert "OUT OF TIME" in first and "exit code 124" in first
    assert second.startswith("info") and " ok " in second
    assert "version" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
def test_gpu_all_refuses_unknown_stages(tmp_path):
    done = run_gpu_all(tmp_path / "out", "info", "everything")
    assert done.returncode == 2 and "everything" in done.stderr
    assert not (tmp_path / "out").exists()
