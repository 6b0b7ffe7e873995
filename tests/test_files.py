"""Files of adapters: damaged, changed while they are read, of strange kinds; and the folders they are put into."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from definition import image, net, to_generic_point
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mapsurgery
from mapsurgery import _tensor_file
from mapsurgery._atomic_write import folder_beside, write_whole
from mapsurgery._tensor_file import opened
from mapsurgery.integrations.peft import load_peft, save_peft


def trained(seed: int = 1, **options: Any) -> nn.Module:
    return to_generic_point(mapsurgery.patch(net(), ["stem", "body"], rank=2, train=["head"], **options), seed).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    mapsurgery.save(trained(), path)
    return path


def test_safetensors_reads_what_is_written(path: Path) -> None:
    expected = mapsurgery.adapter_state_dict(trained())
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(expected) and len(file.metadata()["checksum"]) == 64
    assert all(torch.equal(t, expected[name]) for name, t in load_file(path).items())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool], ids=str
)
def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "odd": torch.arange(7).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "number": torch.ones((), dtype=dtype),
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "byte": torch.ones(1, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "file")
    with opened(tmp_path / "file") as file:
        found = file.read()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (
            found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) and found[name].shape == tensor.shape
        )


# Damage ---------------------------------------------------------------------------------------------------------------


def _refused(path: Path, match: str = ".", error: type | tuple[type, ...] = ValueError) -> None:
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=match):
        mapsurgery.load(model, path)
    assert not any(isinstance(module, mapsurgery.AdaptedLayer) for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("where", ["body", "header"])
def test_no_flipped_bit_goes_unnoticed(path: Path, where: str) -> None:
    content, chosen = path.read_bytes(), random.Random(0)
    start = 8 + int.from_bytes(content[:8], "little")
    first, last = (start, len(content)) if where == "body" else (0, start)
    names = content.rstrip(b" ")
    for _ in range(60):
        place, bit = chosen.randrange(first, last), chosen.randrange(8)
        if where == "header" and place >= len(names.rstrip()):
            continue
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        padding = where == "header" and content[place : place + 1] == b" "
        if padding and damaged[place] in b"\t\n\r ":
            continue  # white space of JSON
        _refused(path)


def test_a_damaged_file_is_not_restored_either(path: Path) -> None:
    model = trained(seed=7)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        mapsurgery._adapter_file.restore(model, path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def _header(entries: dict[str, Any], body: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "cut in the length": (b"\x08\0\0", "3 bytes"),
    "longer than it is": (struct.pack("<Q", 1 << 60), "header would have"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "not valid JSON"),
    "nested": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON"),
    "a list": (_header([]), "a list"),  # type: ignore[arg-type]
    "metadata of numbers": (_header({"__metadata__": {"a": 1}}), "dictionary of texts"),
    "an entry that is none": (_header({"a": [1]}), "entry of a"),
    "a negative size": (_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4), "shape"),
    "a size that is true": (_header({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4), "shape"),
    "a dtype that is a list": (_header({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4), "dtype"),
    "strides that overflow": (
        _header({"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
        "shape",
    ),
    "sizes that overflow": (
        _header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        "0 bytes, and shape",
    ),
    "too many dimensions": (
        _header({"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}, 4),
        "65 dimensions",
    ),
    "a dtype that is an attribute of torch": (
        _header({"a": {"dtype": "nn", "shape": [1], "data_offsets": [0, 4]}}, 4),
        "dtype 'nn'",
    ),
    "a span that does not fit its shape": (
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4),
        "4 bytes, and shape",
    ),
    "a hole": (_header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, 2), "leave bytes out"),
    "an overlap": (
        _header({n: {"dtype": "U8", "shape": [2], "data_offsets": [i, i + 2]} for i, n in enumerate("ab")}, 3),
        "overlap",
    ),
    "bytes that nothing announces": (
        _header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 9),
        "9 are there",
    ),
}


@pytest.mark.parametrize("kind", [*BROKEN])
def test_a_broken_file_says_how(tmp_path: Path, kind: str) -> None:
    content, message = BROKEN[kind]
    (tmp_path / "file").write_bytes(content)
    _refused(tmp_path / "file", f"file is not a complete safetensors file.*{message}")


@pytest.mark.parametrize("by", ["load", "restore", "load_peft"])
def test_a_sparse_file_that_announces_gigabytes_takes_no_memory(tmp_path: Path, path: Path, by: str) -> None:
    """Its shapes are wrong, which is known before its numbers are read: 1 TiB would not fit."""
    size = 1 << 40
    if by == "load_peft":
        path = tmp_path / "adapter_model.safetensors"
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
        header = {"base_model.model.body.0.lora_A.weight": None}
    else:
        with safe_open(path, "pt") as file:
            header = {"__metadata__": file.metadata()}
        entries = dict.fromkeys(load_file(path))
        header |= entries
    first = next(name for name in header if name != "__metadata__")
    at = 0
    for name in header:
        if name != "__metadata__":
            count = size if name == first else 4
            header[name] = {"dtype": "F32", "shape": [count // 4], "data_offsets": [at, at + count]}
            at += count
    content = _header(header)
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(len(content) + at)
    call = {
        "load": lambda: mapsurgery.load(net(), path),
        "restore": lambda: mapsurgery._adapter_file.restore(trained(), path),
        "load_peft": lambda: load_peft(net(), tmp_path),
    }[by]
    with pytest.raises(ValueError, match="shape|announces"):
        call()


# Files that change ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["cut", "rewritten"])
def test_a_file_that_changes_while_it_is_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """In place, after its header was checked. A mapped file would end the process, or give other numbers."""
    original = _tensor_file.TensorFile.read
    path = tmp_path / "adapter.safetensors"
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 256))  # more than what Python reads ahead
    mapsurgery.save(mapsurgery.patch(copy.deepcopy(base), "0", rank=64), path)

    def read(self: Any, beside: str = "") -> Any:
        with open(path, "r+b") as file:
            if change == "cut":
                file.truncate(9000)
            else:
                file.seek(-64, os.SEEK_END)
                file.write(bytes(64))
        return original(self, beside)

    monkeypatch.setattr(_tensor_file.TensorFile, "read", read)
    with pytest.raises(ValueError, match="cut while it was read" if change == "cut" else "checksum"):
        mapsurgery.load(base, path)
    assert type(base[0]) is nn.Linear


def test_tensors_that_were_read_do_not_change_with_the_file(path: Path) -> None:
    with opened(path) as file:
        tensors = file.read()
    before = {name: t.clone() for name, t in tensors.items()}
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())


def test_no_reader_gets_one_adapter_with_the_alpha_of_another(tmp_path: Path) -> None:
    """`save_peft` writes two files, one after the other, while others read."""

    def adapter(alpha: float) -> nn.Module:
        return to_generic_point(
            mapsurgery.patch(net(), "body", rank=2, method=mapsurgery.Lora(alpha=alpha)), int(alpha)
        )

    models = [adapter(4), adapter(16)]
    save_peft(models[0], tmp_path / "peft")
    expected = [model.eval()(image()) for model in models]
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for model in models:
                save_peft(model, tmp_path / "peft")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            output = load_peft(net().eval(), tmp_path / "peft")(image())
            assert any(torch.allclose(output, other, atol=1e-6) for other in expected)
    finally:
        done.set()
        writer.join()


def test_tensors_beside_another_configuration_are_refused(tmp_path: Path) -> None:
    save_peft(to_generic_point(mapsurgery.patch(net(), "body", rank=2, method="lora")), tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"base_model_name_or_path": null', '"base_model_name_or_path": "mine"'))
    load_peft(net(), tmp_path / "peft")  # what the tensors mean is the same
    config.write_text(text.replace('"lora_alpha": ', '"lora_alpha": 3'))
    with pytest.raises(ValueError, match="two adapters"):
        load_peft(net(), tmp_path / "peft")


# Strange places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("call", ["load", "save", "History.load"])
def test_what_is_no_file_is_refused_and_stays(tmp_path: Path, kind: str, call: str) -> None:
    path = tmp_path / "place"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/null")
    mode = os.lstat(path).st_mode
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: mapsurgery.load(net(), path),
        "save": lambda: mapsurgery.save(trained(), path),
        "History.load": lambda: mapsurgery.History.load(path),
    }
    with pytest.raises(OSError, match="folder" if kind == "folder" else "pipe"):
        calls[call]()
    assert os.lstat(path).st_mode == mode


def test_a_file_that_may_not_be_read_is_not_called_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def denied(name: Any, *args: Any, **kwargs: Any) -> int:  # root may read whatever its mode is
        if os.fspath(name) == str(path):
            raise PermissionError(13, "Permission denied", name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    _refused(path, "Permission denied", PermissionError)


# What writers leave ---------------------------------------------------------------------------------------------------


def test_what_a_killed_save_left_goes_with_the_next(path: Path) -> None:
    script = (
        "import os, signal\n"
        "from mapsurgery import _atomic_write\n"
        "_atomic_write._write = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"_atomic_write.write_whole({{{str(path)!r}: [b'new']}})\n"
    )
    before = path.read_bytes()
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(mapsurgery.__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    left = [name for name in os.listdir(path.parent) if name != path.name]
    assert len(left) == 1 and left[0].startswith(".mapsurgery-") and path.read_bytes() == before
    mapsurgery.save(trained(), path)
    assert os.listdir(path.parent) == [path.name]


def test_the_folder_of_a_killed_export_goes_with_the_next(tmp_path: Path) -> None:
    script = (
        "import os, signal\n"
        "from mapsurgery._atomic_write import folder_beside\n"
        f"with folder_beside({str(tmp_path / 'model.pt2')!r}) as folder:\n"
        "    open(folder + '/half', 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(mapsurgery.__file__).parents[1])
    assert len(os.listdir(tmp_path)) == 1
    with folder_beside(str(tmp_path / "model.pt2")) as folder:
        assert os.listdir(tmp_path) == [os.path.basename(folder)]
        write_whole({str(tmp_path / "other"): [b"x"]})
        assert os.path.isdir(folder)  # whose process lives
    assert os.listdir(tmp_path) == ["other"]


def test_what_another_writer_is_writing_is_left_to_it(path: Path) -> None:
    seen: list[list[str]] = []

    def slowly() -> Any:
        yield b"one"
        mapsurgery.save(trained(), path)  # another save into the same folder, while this file is not there yet
        seen.append([name for name in os.listdir(path.parent) if name.startswith(".mapsurgery-")])
        yield b"two"

    write_whole({str(path.parent / "other"): slowly()})
    assert len(seen[0]) == 1
    assert (path.parent / "other").read_bytes() == b"onetwo" and sorted(os.listdir(path.parent)) == [path.name, "other"]


def test_writers_of_one_folder_do_not_take_each_others_files(path: Path) -> None:
    errors: list[BaseException] = []

    def write(i: int) -> None:
        try:
            for n in range(30):
                write_whole({str(path.parent / f"{i}"): [bytes([n]) * 100]})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(os.listdir(path.parent)) == sorted([path.name, *map(str, range(4))])


def test_a_file_of_ones_own_that_looks_like_ours_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / ".mapsurgery-link.tmp").symlink_to(target)
    mapsurgery.save(trained(), path)
    assert target.read_text() == "mine"


def test_the_folder_is_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    mapsurgery.save(trained(), path)
    assert synced == [False, True]


@pytest.mark.long
@pytest.mark.parametrize("wait", [0.0, 0.013, 0.031, 0.07])
def test_a_killed_process_leaves_one_of_the_two_files(path: Path, wait: float) -> None:
    """A process that saves over and over is killed at any time: what is there loads."""
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import mapsurgery, test_files\n"
        "model = test_files.trained()\n"
        "print('ready', flush=True)\n"
        f"while True: mapsurgery.save(model, {str(path)!r})\n"
    )
    root = Path(mapsurgery.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(wait)
    process.kill()
    process.wait()
    mapsurgery.load(net(), path)
    mapsurgery.save(trained(), path)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "chmod"])
def test_a_file_system_that_cannot_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def unable(*args: Any) -> None:
        raise OSError(errno.EINVAL if call == "fsync" else errno.EPERM, "not here")

    monkeypatch.setattr(os, call, unable)
    mapsurgery.save(trained(), tmp_path / "file")
    mapsurgery.load(net(), tmp_path / "file")


def test_a_path_may_be_bytes(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "file")
    mapsurgery.save(trained(), path)
    mapsurgery.load(net(), path)
