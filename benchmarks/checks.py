"""What it costs to check files and bases: a checksum of bytes, and a weight's fingerprint beside its norm.

    python benchmarks/checks.py --threads 1                   # 256 MiB of bytes, weights of 4096 x 4096
    python benchmarks/checks.py --mib 1 --width 64            # a moment

The library writes the SHA-256 of a file's tensors into its metadata, and compares it before a model is touched. `patch`
and `load` read each adapted weight once, for ||W||_F and for 8 more sums that a base is known by.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import torch
from common import Row, Stamps, make_parser, median, paired_ratio, positive, print_paths, start, table, write_results

import mapsurgery  # noqa: F401  (brings the operators)

HASHES: dict[str, Callable[[bytes], Any]] = {
    "sha256": hashlib.sha256,
    "blake2b": hashlib.blake2b,
    "blake2s": hashlib.blake2s,
    "sha1": hashlib.sha1,
    "crc32": zlib.crc32,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = {"what": "what", "of": "of", "ms": "ms", "gbs": "GB/s", "to_first": "x the first"}
NOTES = (
    "Medians over rounds in which all take turns; x the first: median of the ratios in a round, to sha256 and to the "
    "norm. crc32 is no hash: two files may be made that share it."
)


def rounds(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns; a round before them does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(repeats + 1):
        for name, call in calls.items():
            stamps = Stamps(device)
            stamps.mark()
            call()
            stamps.mark()
            if index:
                times[name] += stamps.milliseconds()
    return times


def rows_of(of: str, size: int, times: dict[str, list[float]]) -> list[Row]:
    """Args: size: bytes that a call reads."""
    first = next(iter(times.values()))
    return [
        {"what": name, "of": of, "ms": median(ms), "gbs": size / median(ms) / 1e6, "to_first": paired_ratio(ms, first)}
        for name, ms in times.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = make_parser(__doc__, repeats=7, rank=False)
    parser.add_argument("--mib", type=positive, default=256, help="of bytes for the checksums (default 256)")
    parser.add_argument("--width", type=positive, default=4096, help="of the weight (default 4096)")
    arguments = parser.parse_args(argv)
    device, run = start(arguments, repeats=arguments.repeats)
    data = torch.randint(0, 256, (arguments.mib << 20,), dtype=torch.uint8).numpy().tobytes()
    hashes = {name: lambda function=function: function(data) for name, function in HASHES.items()}
    rows = rows_of(f"{arguments.mib} MiB", len(data), rounds(hashes, arguments.repeats, torch.device("cpu")))
    ops = torch.ops.mapsurgery
    for name, dtype in DTYPES.items():
        weight = torch.randn(arguments.width, arguments.width, device=device).to(dtype)
        reads = {"norm": lambda w=weight: ops.squared_norm(w), "fingerprint": lambda w=weight: ops.fingerprint(w)}
        times = rounds(reads, arguments.repeats, device)
        rows += rows_of(f"{arguments.width} x {arguments.width}, {name}", weight.nbytes, times)
    print(table("checks", rows, COLUMNS))
    print_paths(write_results(arguments.out, "checks", arguments.tag, rows, COLUMNS, run, NOTES))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
