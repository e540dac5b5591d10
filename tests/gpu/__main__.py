"""`python -m tests.gpu`: every test that needs a GPU, in processes side by side, within minutes.

The files of tests/ops run once for each implementation of theirs on a GPU, tests/gpu once. Most of
the time goes into compiling Triton's kernels, on the CPU. What has not ended in time is stopped and
counted as failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.gpu.kernels import kernels

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """A pytest process."""

    name: str
    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, until: float) -> tuple[str, str]:
        """passed, failed or not done; and what it printed."""
        seconds = until - time.monotonic()
        if seconds <= 0:
            return "not done", ""
        try:
            done = subprocess.run(
                [sys.executable, *self.arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as stopped:
            output = stopped.stdout or b""
            return "not done", output.decode(errors="replace") if isinstance(
                output, bytes
            ) else output
        return ("passed" if done.returncode == 0 else "failed"), done.stdout


def jobs() -> list[Job]:
    """The longest first."""
    pytest = ["-m", "pytest", "-m", "gpu"]
    found = [
        Job("compute-sanitizer", [*pytest, "tests/gpu", "-k", "sanitizer"]),
        Job("tests/gpu", [*pytest, "tests/gpu", "tests/iv2/test_dali.py", "-k", "not sanitizer"]),
    ]
    for op, impl in sorted(kernels(), key=lambda kernel: (kernel[1] != "triton", kernel[0])):
        file = f"tests/ops/test_{op}.py"
        # each width is compiled anew
        chosen = ["-k", "not any_shape"] if impl == "triton" else []
        found.append(Job(f"{file} {impl}", [*pytest, file, *chosen], {"IV2_TEST_GPU": impl}))
    return found


def main(given: Sequence[str] | None = None) -> int:
    """How many have not passed, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0, help="for all together")
    parser.add_argument("--processes", type=int, default=min(max((os.cpu_count() or 2) // 2, 1), 8))
    options = parser.parse_args(given)
    if not torch.cuda.is_available():
        print("no GPU: nothing was run")
        return 1
    print(torch.cuda.get_device_name(), flush=True)
    until = time.monotonic() + 60 * options.minutes
    wrong = 0
    with ThreadPoolExecutor(options.processes) as pool:
        todo = jobs()
        for job, (state, output) in zip(todo, pool.map(lambda j: j.run(until), todo), strict=True):
            lines = output.splitlines()
            print(f"{state:9s} {job.name:52s} {lines[-1] if lines else ''}", flush=True)
            if state != "passed":
                wrong += 1
                print("\n".join(f"    {line}" for line in lines[-60:]), flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
