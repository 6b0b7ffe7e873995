"""What a wheel holds: this build's libraries, and none that an earlier one left in the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CUDA = "mapsurgery/libmapsurgery_cuda.so"


def _wheel(source: Path, **environment: str) -> set[str]:
    """Names of the files in a wheel that is built from this source tree."""
    out = source.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, source]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from, without what was built in it."""
    copy = tmp_path / "source"
    built = shutil.ignore_patterns("*.so", "share", "__pycache__")
    shutil.copytree(ROOT / "mapsurgery", copy / "mapsurgery", ignore=built)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    return copy


@pytest.mark.slow
def test_a_wheel_takes_no_library_that_another_build_left(source: Path) -> None:
    (source / CUDA).write_text("stale")  # as `pip install -e .` leaves it in the source tree
    names = _wheel(source, MAPSURGERY_NATIVE="0")
    assert "mapsurgery/__init__.py" in names and not [name for name in names if name.endswith(".so")]
    (kept,) = (source / "build").glob("lib*/mapsurgery")  # setuptools' own folder, which it uses again
    (kept / "libmapsurgery_cuda.so").write_text("stale")
    (kept / "share").mkdir()
    (kept / "share" / "mapsurgeryConfig.cmake").write_text("stale")
    assert _wheel(source, MAPSURGERY_NATIVE="0") == names
