"""benchmarks/methods.py: a fair and resumable search, selection without the test data, and the page made of it."""

import csv
import dataclasses
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def import_benchmarks(monkeypatch):
    """The scripts import their neighbours; random numbers stay as they were."""
    for folder in (ROOT / "examples", BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))
    with torch.random.fork_rng():
        yield


class Net(nn.Module):
    """Two layers to adapt and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def task():
    """Three classes that depend on the input's direction, which a random frozen body hides from the head."""
    from comparison.classification import classification, split_samples
    from comparison.task import Task

    torch.manual_seed(0)
    x = torch.randn(300, 10)
    labels = (x @ torch.randn(10, 3)).argmax(1)
    data = split_samples(x, labels, {"train": 100, "validation": 100, "test": 100})
    state = Net().state_dict()

    def model():
        net = Net()
        net.load_state_dict(state)
        return net

    loss, score = classification(data.pop("train"), data)
    return Task("tiny", "a net", model, ("body*",), ("head",), 1e-3, loss, score, 1 / 3, 100, 5, 32)


METHODS = ["peft-lora", "peft-dora", "peft-delora", "map"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_as_the_base_and_trains_all_of_its_adapter(task, method):
    from comparison import adapters

    torch.manual_seed(0)
    base, x = task.model(), torch.randn(5, 10)
    model = adapters.adapt(task.model(), method, task.targets, task.head)
    torch.testing.assert_close(model(x), base(x))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("head")} == {"head.weight", "head.bias"}
    groups = adapters.param_groups(model, method, task.head, 0.01, 0.001)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trained.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        optimizer.zero_grad()
        task.loss(model, torch.arange(50), torch.Generator()).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained.keys()


@pytest.mark.parametrize("method", ["frozen", *METHODS])
def test_only_the_adapters_rate_follows_the_search(task, method):
    from comparison import adapters

    model = adapters.adapt(task.model(), method, task.targets, task.head)
    rates = {
        p: group["lr"] for group in adapters.param_groups(model, method, task.head, 0.5, 0.01) for p in group["params"]
    }
    head = set(model.head.parameters())
    assert {rate for p, rate in rates.items() if p in head} == {0.01}
    assert {rate for p, rate in rates.items() if p not in head} == (set() if method == "frozen" else {0.5})
    assert adapters.trained_parameters(model, task.head) == sum(p.numel() for p in rates if p not in head)


def test_peft_adapts_the_layers_that_this_library_adapts(task):
    from comparison import adapters

    import mapsurgery

    planned = [layer.path for layer in mapsurgery.plan(task.model(), task.targets).layers]
    for method in adapters.PEFT:
        model = adapters.adapt(task.model(), method, task.targets, task.head)
        assert [name for name, m in model.named_modules() if hasattr(m, "base_layer")] == planned


def test_deloras_bound_is_a_share_of_the_weight(task):
    from comparison import adapters

    model = adapters.adapt(task.model(), "peft-delora", task.targets, task.head)
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            bound = layer.delora_lambda["default"].item()
            assert bound == pytest.approx(adapters.DELORA_BOUND * layer.base_layer.in_features**0.5), name


def test_all_methods_see_the_same_batches_and_noise(task):
    from comparison.training import train_once

    seen = []

    def loss(model, indices, random):
        seen[-1].append((indices.tolist(), torch.rand((), generator=random).item()))
        return task.loss(model, indices, random)

    watched = dataclasses.replace(task, loss=loss)
    runs = [("frozen", 0.0), *((method, 1e-3) for method in METHODS), ("map", 1e-2)]
    for method, lr in runs:
        seen.append([])
        train_once(watched, method, lr, seed=1)
    assert len(seen[0]) == task.steps == 15
    assert all(other == seen[0] for other in seen)
    assert all(len(set(indices)) == task.batch for indices, _ in seen[0])
    seen.append([])
    train_once(watched, "map", 1e-3, seed=2)
    assert seen[-1] != seen[0]


def test_adapters_beat_the_frozen_model_and_repeat_exactly(task):
    from comparison.training import train_once

    frozen = train_once(task, "frozen", 0.0, 0)
    assert frozen.trained == 0
    for method in ("peft-lora", "map"):
        outcome = train_once(task, method, 3e-2, 0)
        assert outcome.loss < 0.95 * frozen.loss and outcome.test > frozen.test + 0.1
        assert train_once(task, method, 3e-2, 0) == outcome


def test_a_training_that_diverges_is_scored_as_useless(task):
    from comparison.training import train_once

    calls = []

    def loss(model, indices, random):
        calls.append(1)
        return task.loss(model, indices, random) * (math.nan if len(calls) == 3 else 1)

    outcome = train_once(dataclasses.replace(task, loss=loss), "map", 1e-3, 0)
    assert outcome.diverged and len(calls) == 3
    assert outcome.validation == outcome.test == task.useless


def test_a_last_step_that_breaks_the_weights_counts_as_diverged(task):
    from comparison.training import train_once

    outcome = train_once(task, "peft-lora", math.inf, 0)
    assert outcome.diverged and outcome.test == task.useless


def test_a_task_without_head_scores_the_frozen_model_as_it_is(task):
    from comparison.training import train_once

    bare = dataclasses.replace(task, head=())
    outcome = train_once(bare, "frozen", 0.0, 0)
    assert outcome.test == task.score(task.model(), "test") and math.isnan(outcome.loss)


# --- the search -------------------------------------------------------------------------------------------------------


def test_a_search_resumes_where_it_was(task, tmp_path, monkeypatch):
    import methods
    from comparison.training import Outcome

    trained, interrupted = [], []

    def train_once(task, method, lr, seed):
        trained.append((method, lr, seed))
        if len(trained) == 4 and not interrupted:
            interrupted.append(trained.pop())
            raise KeyboardInterrupt
        return Outcome(0.5, 0.25, 7, 0.1, diverged=False)

    monkeypatch.setattr(methods, "train_once", train_once)
    path = tmp_path / "methods.csv"
    search = (task, ["frozen", "peft-lora", "map"], [1e-3, 1e-2], 2, path)
    with pytest.raises(KeyboardInterrupt):
        methods.train_missing(*search)
    assert len(methods.read(path)) == 3  # each outcome was written at once
    methods.train_missing(*search)
    per_seed = [("frozen", 0.0), ("peft-lora", 1e-3), ("peft-lora", 1e-2), ("map", 1e-3), ("map", 1e-2)]
    assert trained == [(method, lr, seed) for seed in (0, 1) for method, lr in per_seed]
    assert interrupted == [trained[3]]
    methods.train_missing(*search)
    assert len(trained) == 10  # nothing is left to do
    methods.train_missing(dataclasses.replace(task, epochs=6), *search[1:])
    assert len(trained) == 20  # another setting is another training
    row = methods.read(path)[1]
    assert (row["method"], row["lr"], row["validation"], row["test"]) == ("peft-lora", "0.001", "0.50000", "0.25000")
    assert row["setting"] == task.setting and "torch" in row["environment"]


def test_all_methods_are_searched_alike():
    from comparison import adapters

    grids = [adapters.learning_rates(name) for name in ("peft-lora", "peft-delora", "map", "map+vera")]
    for grid in grids:
        assert len(grid) == len(adapters.LEARNING_RATES) >= 4 and math.log10(grid[-1] / grid[0]) >= 1
        assert [lr / grid[0] for lr in grid] == pytest.approx([lr / grids[0][0] for lr in grids[0]])
    assert adapters.learning_rates("map+vera", [2e-3]) == [pytest.approx(2e-3 * adapters.FACTORS["vera"])]
    assert adapters.learning_rates("frozen") == [0.0]


@pytest.mark.parametrize(
    "method, message", [("peft-nothing", "peft-dora"), ("nothing", "nothing"), ("map+nothing", "nothing")]
)
def test_an_unknown_method_is_refused_before_anything_is_trained(task, method, message):
    from comparison import adapters

    with pytest.raises(ValueError, match=message):
        adapters.check_method(task.model(), method, task.targets)


# --- the tables -------------------------------------------------------------------------------------------------------


def trial(method, lr, seed, validation, test, diverged=False):
    from comparison.summary import Trial

    return Trial("tiny", method, lr, seed, validation, test, 7, diverged)


def test_the_rate_is_chosen_on_validation_data():
    from comparison.summary import summarise

    trials = [
        trial("map", 1e-2, 0, 0.9, 0.1),
        trial("map", 1e-2, 1, 0.9, 0.3),
        trial("map", 1e-3, 0, 0.5, 1.0),  # better on the test data, which has no say
        trial("map", 1e-3, 1, 1.0, 1.0),
    ]
    (summary,) = summarise(trials)
    assert summary.best.lr == 1e-2 and summary.best.mean == pytest.approx(0.2)
    assert summary.best.spread == pytest.approx(math.sqrt(0.02))
    assert summary.at_edge and summary.search == (2, 2, 1.0)


def test_sensitivity_by_hand():
    from comparison.summary import kept, summarise

    scores = {1e-4: 0.5, 1e-3: 0.9, 1e-1: 0.7}
    (summary,) = summarise([trial("map", lr, 0, score, score) for lr, score in scores.items()])
    assert summary.worst == 0.5 and summary.decades == pytest.approx(3) and not summary.at_edge
    assert summary.area == pytest.approx((1 * 0.7 + 2 * 0.8) / 3)
    assert kept(summary, 0.4) == pytest.approx((summary.area - 0.4) / 0.5)
    assert math.isnan(kept(summary, 0.95))


def test_an_unequal_search_is_named():
    from comparison.summary import summarise, unequal_search

    both = [trial(method, lr, 0, 0.5, 0.5) for method in ("peft-lora", "map") for lr in (1e-3, 1e-2)]
    assert unequal_search(summarise([*both, trial("frozen", 0.0, 0, 0.1, 0.1)])) == ""
    message = unequal_search(summarise([*both, trial("map", 1e-1, 0, 0.5, 0.5)]))
    assert "3 rates x 1 seeds" in message and "map" in message and "2 rates" in message


HEADER = "task,method,lr,seed,setting,validation,test,trained,loss,diverged,seconds,environment"
RESULTS = f"""\
{HEADER}
vision,frozen,0,0,short,.40,.40,0,2,0,1,some CPU
vision,frozen,0,1,short,.40,.42,0,2,0,1,some CPU
vision,peft-lora,0.001,0,short,.80,.81,100,1,0,1,some CPU
vision,peft-lora,0.001,1,short,.80,.83,100,1,0,1,some CPU
vision,peft-lora,0.01,0,short,.70,.90,100,1,0,1,some CPU
vision,peft-lora,0.01,1,short,.10,.10,100,nan,1,1,some CPU
vision,map,0.001,0,short,.80,.80,120,1,0,1,some CPU
vision,map,0.001,1,short,.80,.80,120,1,0,1,some CPU
vision,map,0.01,0,short,.85,.86,120,1,0,1,some CPU
vision,map,0.01,1,short,.85,.84,120,1,0,1,some CPU
"""
TIMES = """\
task,method,setting,trained,step_ms,iqr_ms,to_lora,saved_mib,state_mib,rounds,environment
vision,peft-lora,short,100,10,1,1.000,5.5,1,9,some CPU
vision,map,short,120,11,1,1.100,5.6,1,9,some CPU
vision,frozen,other,0,99,9,9.900,9.9,9,9,some CPU
"""


def markdown_rows(text):
    """Rows of a page's first table by the first column's value."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    head = lines[0]
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in lines[2:5]}


def test_the_page_comes_from_the_files(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    import methods

    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "methods.csv").write_text(RESULTS)
    (folder / "methods_time.csv").write_text(TIMES)
    methods.main(["table", "--results", str(folder)])
    page = (folder / "methods.md").read_text()
    rows = markdown_rows(page)
    assert rows["map"]["score at the chosen lr"] == "0.850 ± 0.014" and rows["map"]["chosen lr"] == "0.01 †"
    assert rows["peft-lora"]["score at the chosen lr"] == "0.820 ± 0.014"
    assert rows["peft-lora"]["chosen lr"] == "0.001 †" and rows["peft-lora"]["diverged"] == "1 of 4"
    assert rows["peft-lora"]["worst over the grid"] == "0.500"
    assert rows["map"]["gain kept"] == f"{(0.825 - 0.41) / (0.85 - 0.41):.2f}"
    assert rows["map"]["time / LoRA"] == "1.100" and rows["frozen"]["time / LoRA"] == "-"  # timed in another setting
    assert "../plots/methods_vision.png" in page and "2 rates x 2 seeds" in page and "NOT" not in page
    assert "0.850 ± 0.014" in capsys.readouterr().out
    with image.open(tmp_path / "plots" / "methods_vision.png") as picture:
        assert picture.width > 600 and len(picture.getcolors(1 << 20)) > 20


def test_settings_are_not_mixed(tmp_path):
    import methods

    (tmp_path / "methods.csv").write_text(RESULTS + "vision,map,0.01,2,long,.9,.9,120,1,0,1,some CPU\n")
    with pytest.raises(SystemExit, match=r"(?s)vision in several settings.*long\nshort"):
        methods.main(["table", "--results", str(tmp_path)])


def test_no_results_no_table(tmp_path):
    import methods

    with pytest.raises(SystemExit, match="run TASK"):
        methods.main(["table", "--results", str(tmp_path)])


def test_without_matplotlib(tmp_path, monkeypatch):
    import methods

    (tmp_path / "methods.csv").write_text(RESULTS)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=re.escape("mapsurgery[plots]")):
        methods.main(["table", "--results", str(tmp_path)])


def test_times(task, tmp_path, monkeypatch, capsys):
    import methods

    monkeypatch.setattr(methods, "load_task", lambda args: dataclasses.replace(task, name=args.task))
    (tmp_path / "methods_time.csv").write_text(TIMES + "text,map,short,1,1,1,1,1,1,9,some CPU\n")
    options = ["--device", "cpu", "--rounds", "2", "--results", str(tmp_path), "--methods", "frozen", "map"]
    methods.main(["time", "vision", *options])
    with (tmp_path / "methods_time.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["method"]) for row in rows] == [
        ("text", "map"),
        ("vision", "peft-lora"),
        ("vision", "map"),
    ]
    lora, ours = rows[1:]
    assert float(lora["to_lora"]) == 1 and int(ours["trained"]) == int(lora["trained"]) + 4  # two magnitudes per layer
    assert all(float(row["step_ms"]) > 0 and float(row["state_mib"]) > 0 for row in rows[1:])
    assert ours["setting"] == task.setting and "map" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_the_vision_task(tmp_path):
    pytest.importorskip("timm")
    import methods
    from comparison.task import Options
    from comparison.tasks import TASKS
    from packaged import MissingPackageError

    try:
        task = TASKS["vision"].load(Options(torch.device("cpu")))
    except MissingPackageError as error:
        pytest.skip(str(error))
    short = dataclasses.replace(task, samples=4, batch=2, epochs=1)
    path = tmp_path / "methods.csv"
    methods.train_missing(short, ["frozen", "map"], [1e-3], 1, path)
    assert [row["diverged"] for row in methods.read(path)] == ["0", "0"]


def test_packed_choices_have_the_likelihoods_that_each_has_alone():
    """Of the whole model, one choice at a time."""
    transformers = pytest.importorskip("transformers")
    from comparison.packed_choices import choice_log_likelihoods, log_likelihoods, pack, split_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    questions = [([1, 2, 3, 4], [[5, 6], [7], [8, 9, 10]]), ([11, 12], [[13], [14, 15]])]
    with torch.no_grad():
        alone = []
        for prompt, choices in questions:
            logs = [model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1) for choice in choices]
            for log, choice in zip(logs, choices, strict=True):
                alone.append(sum(log[len(prompt) - 1 + i, token] for i, token in enumerate(choice)))
        lower, upper = split_model(model, 2)
        packed = [pack(lower, prompt, choices, torch.device("cpu")) for prompt, choices in questions]
        found = log_likelihoods(upper, packed)
        together = [choice_log_likelihoods(question, values) for question, values in zip(packed, found, strict=True)]
    assert len(upper.model.layers) == 1 and len(lower.layers) == 2
    torch.testing.assert_close(torch.cat(together), torch.stack(alone))
