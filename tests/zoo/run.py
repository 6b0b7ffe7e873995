"""Judge the whole zoo in two worker processes: `make zoo`, or `PYTHONPATH=tests python -m zoo.run --help`.

Verdicts are appended to outputs/zoo/<column>.jsonl as they come; what is there already is not judged again unless
--fresh says so. A crash, a hang or too much memory is the verdict of its entry and does not end the run.
"""

from __future__ import annotations

import argparse
import os
import queue
import select
import subprocess
import sys
import threading
import time
from fnmatch import fnmatchcase
from pathlib import Path

import psutil

from . import inventory, tables
from .verdict import COLUMNS, Verdict

FOLDER = Path(__file__).resolve().parents[2] / "outputs" / "zoo"
SECONDS = 60.0
"""Of computing that one entry may take: on a busy machine that is much longer by the clock."""
WAITING = 600.0
"""Seconds by the clock, for what hangs without computing."""


class _Clock:
    """How long a process has computed since."""

    def __init__(self, pid: int) -> None:
        self.process, self.wall = psutil.Process(pid), time.monotonic()
        self.before = self._seconds()

    def _seconds(self) -> float:
        try:
            return sum(self.process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            return self.before  # it has ended, which its closed output tells

    def computed(self) -> float:
        return self._seconds() - self.before

    def late(self) -> bool:
        return self.computed() > SECONDS or time.monotonic() - self.wall > WAITING


class Worker:
    """One long-lived worker process, started anew after a crash."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.pending = b""

    def judge(self, column: str, name: str) -> Verdict:
        """The verdict on an entry, or what became of the worker while it was at it."""
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(f"{column} {name}\n".encode())
        process.stdin.flush()
        clause, started = "start of the worker", _Clock(process.pid)
        while (line := self._line(process, started)) is not None:
            word, _, rest = line.partition(" ")
            if word == "verdict":
                return Verdict.from_json(rest)
            if clause.startswith("start"):
                started = _Clock(process.pid)  # imports are not the entry's
            clause = rest
        seconds = started.computed()  # before it has ended
        return _lost(column, name, clause, self._end(), seconds)

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            with self.log.open("ab") as log:
                command = [sys.executable, "-m", "zoo.worker"]
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
            self.pending = b""
        return self.process

    def _line(self, process: subprocess.Popen[bytes], started: _Clock) -> str | None:
        """The next line of the worker; None if it ended or is late."""
        assert process.stdout is not None
        while b"\n" not in self.pending:
            ready, _, _ = select.select([process.stdout], [], [], 1.0)
            if not ready and not started.late():
                continue
            data = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not data:
                return None
            self.pending += data
        line, _, self.pending = self.pending.partition(b"\n")
        return line.decode()

    def _end(self) -> str:
        """End the worker; returns what had happened to it."""
        process, self.process = self.process, None
        assert process is not None
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"took more than {SECONDS:.0f} s of computing, or hung"
        return f"the process ended with code {code}"

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def _lost(column: str, name: str, clause: str, what: str, seconds: float) -> Verdict:
    """The verdict on an entry whose worker was lost: not runnable if the plain model already did that."""
    verdict = Verdict(name, name.partition("/")[0], column=column, seconds=round(seconds, 2))
    if clause == "plain":
        verdict.kind, verdict.notes = "not runnable", [what]
    else:
        verdict.kind, verdict.failures = "wrong", {clause: what}
    return verdict


def read(column: str) -> dict[str, Verdict]:
    """Verdicts of earlier runs, the last of each entry."""
    path = FOLDER / f"{column}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    verdicts = [Verdict.from_json(line) for line in lines if line.strip()]
    return {verdict.name: verdict for verdict in verdicts}


def judge_all(column: str, names: list[str], workers: int) -> None:
    """Judge entries, appending each verdict to the column's file."""
    waiting: queue.Queue[str] = queue.Queue()
    for name in names:
        waiting.put(name)
    lock = threading.Lock()
    threads = [threading.Thread(target=_work, args=(column, waiting, lock, i, len(names))) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _work(column: str, waiting: queue.Queue[str], lock: threading.Lock, index: int, total: int) -> None:
    worker = Worker(FOLDER / f"worker{index}.log")
    try:
        while True:
            name = waiting.get_nowait()
            verdict = worker.judge(column, name)
            with lock, (FOLDER / f"{column}.jsonl").open("a") as file:
                file.write(verdict.to_json() + "\n")
                done = total - waiting.qsize()
                print(f"{done:4}/{total} {verdict.seconds:6.1f}s {verdict.kind:12} {name}  {verdict.reason[:150]}")
                sys.stdout.flush()
    except queue.Empty:
        worker.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="zoo.run", description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of entries, such as 'timm/*'")
    parser.add_argument("--fresh", action="store_true", help="forget earlier verdicts on these entries")
    parser.add_argument("--peft", action="store_true", help="judge peft too, for the column beside")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the names, no more")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables to a Markdown file, too")
    options = parser.parse_args()
    names = inventory.names(options.only)
    if options.list:
        print("\n".join(names))
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for column in COLUMNS[: 1 + options.peft]:
        known = {} if options.fresh else read(column)
        judge_all(column, [name for name in names if name not in known], options.workers)
    found = {column: {n: v for n, v in read(column).items() if fnmatchcase(n, options.only)} for column in COLUMNS}
    found = {column: {n: v for n, v in verdicts.items() if n in set(names)} for column, verdicts in found.items()}
    print(tables.printed(found))
    if options.report:
        options.report.write_text(tables.markdown(found))
    return int(any(verdict.kind == "wrong" for verdict in found["mapsurgery"].values()))


if __name__ == "__main__":
    sys.exit(main())
