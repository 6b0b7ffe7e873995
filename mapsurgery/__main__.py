"""`python -m mapsurgery info`: what is loaded."""

from __future__ import annotations

import argparse

from ._native import native_info


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mapsurgery", description="MAP adapters for torch models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print which kernels are loaded, and how they were built")
    parser.parse_args(argv)
    print(native_info())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
