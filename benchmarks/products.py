"""The product out = keep out + factor x W^T with both factors on the GPU, by every way that there is to compute it.

    python benchmarks/products.py --device cuda

Shapes are those of Linear layers: T rows of x, W (out, in), and the thin product with W (out, rank) that adds the
update. torch.mm alone, without the factors, is the floor. Every way is compared with float64 before it is timed.
benchmarks/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from functools import cache, partial

import torch
from common import (
    Row,
    Stamps,
    free_memory,
    make_parser,
    median,
    paired_ratio,
    print_paths,
    start,
    table,
    write_results,
)
from ops import captured
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = ((768, 768), (4096, 4096), (4096, 14336), (14336, 4096))  # in, out: ViT-B, Llama 3 8B

# --- cuBLAS, by its C interface: torch's products take their factors from the host ------------------------------------

_OP_N, _OP_T, _COMPUTE_32F, _DEFAULT_ALGORITHM = 0, 1, 68, -1
_HOST, _DEVICE = 0, 1
_TYPES = {torch.float32: 0, torch.bfloat16: 14}
_DISALLOW_REDUCED_PRECISION = 16


@cache
def _cublas() -> ctypes.CDLL:
    """The library that torch has loaded."""
    assert torch.version.cuda is not None
    return ctypes.CDLL(f"libcublas.so.{torch.version.cuda.split('.')[0]}")


def _check(name: str, status: int) -> None:
    if status != 0:
        raise RuntimeError(f"{name}: status {status}")


def cublas(out: Tensor, x: Tensor, W: Tensor, factors: Tensor, batched: bool, reduced: bool) -> None:
    """out = factors[1] out + factors[0] x W^T; contiguous (T, m), (T, K), (m, K) of one dtype.

    Args:
        factors: (2,) float32 on the GPU. batched: by the strided-batched call, with a batch of one.
        reduced: leave torch's default, which allows sums in half precision.

    Raises:
        RuntimeError: cuBLAS refuses the call.
    """
    library, handle = _cublas(), ctypes.c_void_p(torch.cuda.current_blas_handle())
    (T, K), m = x.shape, W.shape[0]
    pointer, size, kind = ctypes.c_void_p, ctypes.c_int64, _TYPES[x.dtype]
    alpha, beta = factors.data_ptr(), factors.data_ptr() + factors.element_size()

    def matrix(t: Tensor, leading: int) -> tuple:
        return (pointer(t.data_ptr()), kind, size(leading), *([ctypes.c_longlong(0)] if batched else []))

    name = "cublasGemmStridedBatchedEx_64" if batched else "cublasGemmEx_64"
    _check("cublasSetPointerMode_v2", library.cublasSetPointerMode_v2(handle, _DEVICE))
    if not reduced:
        library.cublasSetMathMode(handle, _DISALLOW_REDUCED_PRECISION)
    status = getattr(library, name)(
        *(handle, _OP_T, _OP_N, size(m), size(T), size(K)),
        *(pointer(alpha), *matrix(W, K), *matrix(x, K)),
        *(pointer(beta), *matrix(out, m), *([size(1)] if batched else []), _COMPUTE_32F, _DEFAULT_ALGORITHM),
    )
    library.cublasSetMathMode(handle, 0)
    _check("cublasSetPointerMode_v2", library.cublasSetPointerMode_v2(handle, _HOST))
    _check(name, status)


# --- the ways ---------------------------------------------------------------------------------------------------------

Way = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def _mm(out: Tensor, x: Tensor, W: Tensor, factors: Tensor) -> None:
    """What the product alone takes."""
    torch.mm(x, W.t(), out=out)


def _mm_and_pass(out: Tensor, x: Tensor, W: Tensor, factors: Tensor) -> None:
    """The product, and a pass that adds it; the factor is rounded to the dtype of out on the way."""
    torch.addcmul(out, x @ W.t(), factors[0].to(out.dtype), out=out)


def _addmm(out: Tensor, x: Tensor, W: Tensor, factors: Tensor) -> None:
    """With a factor that the host knows."""
    torch.addmm(out, x, W.t(), beta=KEEP, alpha=FACTOR, out=out)


FACTOR, KEEP = 1.25, 1.0
FLOOR = "torch.mm, no factors"
TORCH_WAYS: dict[str, Way] = {
    FLOOR: _mm,
    "torch.mm and a pass": _mm_and_pass,
    "torch.addmm, factors of the host": _addmm,
}
CUDA_WAYS: dict[str, Way] = {
    "strided batched": partial(cublas, batched=True, reduced=False),
    "GemmEx": partial(cublas, batched=False, reduced=False),
    "GemmEx, sums in half precision allowed": partial(cublas, batched=False, reduced=True),
}


def check(ways: dict[str, Way], x: Tensor, W: Tensor, factors: Tensor) -> dict[str, float]:
    """Relative error of each way on the first rows.

    Raises:
        RuntimeError: one is wrong.
    """
    x = x[:64]
    before = torch.randn(len(x), len(W), device=x.device).to(x.dtype)
    product = x.double() @ W.double().t()
    found = {}
    for name, way in ways.items():
        out = before.clone()
        way(out, x, W, factors)
        want = product if name == FLOOR else KEEP * before.double() + FACTOR * product
        found[name] = ((out.double() - want).norm() / want.norm()).item()
        if not found[name] <= (3e-2 if x.dtype == torch.bfloat16 else 1e-3):
            raise RuntimeError(f"{name}: relative error {found[name]:.3g}")
    return found


# --- timing -----------------------------------------------------------------------------------------------------------


def replayed(way: Way, args: tuple[Tensor, ...], calls: int) -> Callable[[], None]:
    """So many calls in a row; on a GPU in a CUDA graph, which leaves out what the host costs."""
    if args[0].is_cuda:
        return captured(way, [args] * calls)

    def run() -> None:
        for _ in range(calls):
            way(*args)

    return run


def measure(
    T: int, K: int, m: int, dtype: torch.dtype, device: torch.device, arguments: argparse.Namespace
) -> list[Row]:
    """One row for each way, from interleaved rounds."""
    x, W = torch.randn(T, K, device=device).to(dtype), (torch.randn(m, K, device=device) / K**0.5).to(dtype)
    out, factors = torch.zeros(T, m, device=device).to(dtype), torch.tensor([FACTOR, KEEP], device=device)
    ways = TORCH_WAYS | (CUDA_WAYS if device.type == "cuda" else {})
    errors = check(ways, x, W, factors)
    # About a millisecond each at 500 TFLOP/s and 3 TB/s.
    floor = max(2 * T * K * m / 5e14, 2 * (T * K + m * K + 2 * T * m) / 3e12)
    calls = 1 if device.type == "cpu" else max(3, min(100, round(1e-3 / floor)))
    runs = {name: replayed(way, (out, x, W, factors), calls) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(arguments.repeats + 1):
        out.zero_()
        names = list(runs)
        for offset in range(len(names)):
            name = names[(index + offset) % len(names)]
            stamps = Stamps(device)
            stamps.mark()
            runs[name]()
            stamps.mark()
            if index > 0:  # the first round warms up
                times[name].append(1e3 * stamps.milliseconds()[0] / calls)
    about = {"T": T, "in": K, "out": m, "dtype": str(dtype).removeprefix("torch.")}
    return [
        {
            **about,
            "way": name,
            "us": median(found),
            "to_mm": paired_ratio(found, times[FLOOR]),
            "tflops": 2e-6 * T * K * m / median(found),
            "gb_per_s": 1e-3 * x.element_size() * (T * K + m * K + 2 * T * m) / median(found),
            "relative_error": errors[name],
        }
        for name, found in times.items()
    ]


COLUMNS = {
    "T": "T",
    "in": "in",
    "out": "out",
    "dtype": "dtype",
    "way": "way",
    "us": "µs",
    "to_mm": "x torch.mm",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "relative_error": "error",
}
NOTES = (
    "out = out + 1.25 x W^T: medians over interleaved rounds of CUDA graphs that repeat the call; ratios are medians "
    "of the ratios within a round. GB/s counts x and W once and out twice. Rows whose 'in' is the rank are the thin "
    "product that adds the update. The host's addmm has its factors as numbers. TF32: see the run."
)


def main(argv: list[str] | None = None) -> int:
    """Raises RuntimeError where a way is wrong or cuBLAS refuses it."""
    parser = make_parser(__doc__, repeats=9)
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 1024, 8192], help="rows of x")
    parser.add_argument("--widths", nargs=2, type=int, action="append", help="in and out of a layer; several times")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    arguments = parser.parse_args(argv)
    device, run = start(arguments, repeats=arguments.repeats)
    rows: list[Row] = []
    for dtype in arguments.dtype:
        for T in arguments.tokens:
            for K, m in arguments.widths or LAYERS:
                for inner in (K, arguments.rank):
                    found = measure(T, inner, m, DTYPES[dtype], device, arguments)
                    rows += found
                    columns = {key: COLUMNS[key] for key in list(COLUMNS)[4:]}
                    print(table(f"{T} x {inner} -> {m}, {dtype}", found, columns), flush=True)
                paths = write_results(arguments.out, "products", arguments.tag, rows, COLUMNS, run, NOTES)
            free_memory(device)
    print_paths(paths)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
