"""Fixtures of all tests: seeded, on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads that wait for one another cost ten times the work on a shared machine
# cuDNN rounds the inputs of float32 convolutions to TF32 unless told not to: no float32 comparison would hold on a GPU.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return torch.device(request.param)


@pytest.fixture
def _fresh_compiler():
    """torch.compile starts from nothing: the limit of recompilations counts over the whole process otherwise."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
