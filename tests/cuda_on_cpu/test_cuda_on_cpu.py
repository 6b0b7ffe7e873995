"""The project's CUDA sources, compiled by the C++ compiler and run on an emulated GPU; see CONTRIBUTING.md."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator reads Linux's list of loaded libraries"),
    pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler"),
]

ORDERS = ("forward", "backward", "shuffled")  # of the threads of a block, and of the blocks of a grid
OPERATOR_TESTS = [str(emulated.PROJECT / "tests" / name) for name in ("test_native_kernels.py", "test_ops.py")]
# Left out, by what their names have in common, because the emulated GPU's tensors call themselves CPU tensors:
NOT_OF_A_GPU = {
    "every_operator_has_a_native_cpu_kernel": "squared_norm and fingerprint have none on a GPU",
    "the_number_of_threads": "torch's products on the CPU stand for those of cuBLAS",
    "the_start_is_the_base_bit_for_bit": "on a GPU no such thing is said of a layer with a bias",
    "switched_off": "of loading, not of kernels",
    "cmake_package": "of loading, not of kernels",
    "a_broken_library": "of loading, not of kernels",
    "opcheck": "of registration in Python, and slow",
    "compiled": "of registration in Python, and slow",
    "traced": "of registration in Python, and slow",
    "gradgradcheck": "of derivatives in Python, and slow",
}
SLOWEST = ("-256-", "a_wide_layer_of_many_rows")  # the first of the rank; left out in two of the orders
RUN_TESTS = """
import sys, pytest, mapsurgery
assert mapsurgery.native_info().cpu_library == sys.argv[1], mapsurgery.native_info()
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(scope="session")
def built(made_once) -> Path:
    """The folder that has the package with the emulated library, and the emulator's objects."""
    return made_once("cuda_on_cpu", lambda folder: emulated.build("cublas", folder))


@pytest.fixture(scope="session")
def faults(made_once, built: Path) -> Path:
    """The library of faults.cu."""

    def make(folder: Path) -> None:
        objects = [built / f"{source.name}.o" for source in emulated.emulator_sources()]
        objects += emulated.compile_all([emulated.HERE / "faults.cu"], folder, ())
        emulated.link(objects, folder / "faults.so", ())

    return made_once("faults_on_cpu", make) / "faults.so"


def run(built: Path, *arguments: str, order: str = "forward") -> str:
    """What Python prints with the emulated library."""
    env = emulated.environment("cublas", built, EMULATED_ORDER=order)
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    call = [sys.executable, *arguments]
    result = subprocess.run(call, env=env, cwd=built, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    return result.stdout


@pytest.mark.parametrize("order", [pytest.param(o, marks=pytest.mark.long) if o != "shuffled" else o for o in ORDERS])
def test_the_operators_tests_pass(built, order):
    library = str(built / "mapsurgery" / emulated.LIBRARY)
    left_out = [*NOT_OF_A_GPU, *(SLOWEST if order != "forward" else ())]
    options = ["-q", "-p", "no:cacheprovider", "-m", "not cuda", "-k", f"not ({' or '.join(left_out)})"]
    output = run(built, "-c", RUN_TESTS, library, *options, *OPERATOR_TESTS, order=order)
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 500, output


def test_random_calls_leave_the_same_bits_in_any_order(built):
    """Blocks and threads that wait for one another only where they have to say so: else the order would show."""
    fuzz = str(emulated.HERE / "fuzz.py")
    outputs = [run(built, fuzz, "--cases", "40", "--seed", "7", order=order) for order in ORDERS]
    assert "results " in outputs[0]
    assert len(set(outputs)) == 1, outputs


def test_the_launches_of_every_operator_are_those_of_the_table(built):
    table = emulated.HERE / "launches.txt"
    now = run(built, str(emulated.HERE / "launch_table.py")).splitlines()
    change = list(difflib.unified_diff(table.read_text().splitlines(), now, "launches.txt", "now", lineterm="", n=0))
    assert not change, "\n".join([*change, "If that is meant: make cuda-launches"])


# ---- that faults are caught

FAULTS = {
    "barrier": r"",
    "missing barrier": r"number \d+ is -?nan",
    "all wait": r"",
    "some leave": r"emulated leaving_kernel: 61 threads wait at .*faults\.cu:\d+, but 3 have left",
    "different barriers": r"emulated parting_kernel: threads wait at different barriers, .*faults\.cu:\d+ and ",
    "index": r"",
    "empty grid": r"emulated leaving_kernel: invalid grid \(0, 1, 1\)",
    "high grid": r"emulated leaving_kernel: invalid grid \(1, 65536, 1\)",
    "large block": r"emulated leaving_kernel: invalid block \(32, 33, 1\)",
    "large parameters": r"emulated large_kernel: 4097 bytes of parameters",
    "product": r"",
    "leading dimension": r"CUBLAS_STATUS_INVALID_VALUE",
    "factors on the host": r"the pointer mode is that of the host",
    "sums in half precision": r"may add up in half precision",
    "modes not restored": r"the modes of torch's handle were not restored",
    "nothing to add up": r"got 1\.0+, not 2",
}


def found_faults(library: Path, order: str, names: list[str]) -> dict[str, str]:
    """What the emulator says of each case of faults.cu."""
    code = (
        "import ctypes, json, sys; fault = ctypes.CDLL(sys.argv[1]).fault; fault.restype = ctypes.c_char_p\n"
        "print(json.dumps({name: fault(name.encode()).decode() for name in sys.argv[2:]}))"
    )
    env = {**os.environ, "EMULATED_ORDER": order}
    return json.loads(subprocess.check_output([sys.executable, "-c", code, str(library), *names], env=env, text=True))


@pytest.mark.parametrize("order", ORDERS)
def test_faults_are_named(faults, order):
    for name, said in found_faults(faults, order, list(FAULTS)).items():
        assert re.search(FAULTS[name] or "^$", said), f"{name}: {said}"


def test_a_block_that_relies_on_another_gives_other_results_in_another_order(faults):
    said = [found_faults(faults, order, ["order of blocks"])["order of blocks"] for order in ORDERS]
    assert said[0] == "" and said[1] == "the last of the blocks counted 1"


SANITIZED = {
    "address": ((), "index", "index out of bounds", "global-buffer-overflow"),
    "thread": (("-DEMULATOR_THREADS",), "barrier", "missing barrier", "data race"),
}


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", SANITIZED)
def test_sanitizers_see_what_kernels_do(tmp_path, sanitizer):
    more, right, wrong, complaint = SANITIZED[sanitizer]
    flags = ("-g", f"-fsanitize={sanitizer}", *more)
    objects = emulated.compile_all([emulated.HERE / "faults.cu", *emulated.emulator_sources()], tmp_path, flags)
    try:
        program = emulated.link(objects, tmp_path / "faults", flags)
    except RuntimeError as error:
        pytest.skip(f"the compiler has no such sanitizer: {error}"[:300])
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    for name in (right, wrong):
        result = subprocess.run([str(program), name], env=env, capture_output=True, text=True, timeout=300)
        assert (result.returncode == 0) == (name == right), result.stderr
        assert (complaint in result.stderr) == (name == wrong), result.stderr
