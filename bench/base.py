"""`python -m bench --base REV`: this tree's kernels against another commit's, process by process.

Both processes run this tree's bench; the other one imports ``iv2kernels`` from a temporary folder
with that commit's sources. Its extension is built there, or copied where no source of it differs.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import iv2kernels

_ROOT = Path(__file__).resolve().parent.parent
_NATIVE = ("csrc", "CMakeLists.txt")
_ROUNDS = 3


def compare(rev: str, ops: Sequence[str], dtypes: Sequence[str], seconds: float) -> None:
    """Print, for each case, how many times faster this tree is than the commit.

    Raises:
        ValueError: There is no such commit, or it cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        _checkout(rev, other)
        times: dict[str, dict[str, list[float]]] = {"base": {}, "this": {}}
        for _ in range(_ROUNDS):
            for side, tree in (("base", other), ("this", _ROOT)):
                for case, value in _run(tree, Path(folder), ops, dtypes, seconds).items():
                    times[side].setdefault(case, []).append(value)
    print(f"{'case':70s} {'base ms':>9s} {'this ms':>9s}  times faster")
    for case in times["this"]:
        if case in times["base"]:
            before, now = (statistics.median(times[side][case]) for side in ("base", "this"))
            print(f"{case:70s} {before:9.3f} {now:9.3f}  {before / now:.2f}")


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, check=False)


def _checkout(rev: str, other: Path) -> None:
    other.mkdir()
    packed = _git("archive", rev, "iv2kernels", *_NATIVE)
    if packed.returncode != 0:
        raise ValueError(f"bench: base must be a commit of this repository, got {rev}")
    subprocess.run(["tar", "x"], cwd=other, input=packed.stdout, check=True)
    if _git("diff", "--quiet", rev, "--", *_NATIVE).returncode == 0:
        for built in Path(iv2kernels.__file__).parent.glob("_C*.so"):
            shutil.copy(built, other / "iv2kernels")
        return
    import pybind11

    # cmake and ninja of this environment (the extra `bench`) before those of the system
    own = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{own}{os.pathsep}{os.environ['PATH']}"}
    for command in (
        [
            *("cmake", "-S", ".", "-B", "build", "-GNinja"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={other / 'iv2kernels'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        ["cmake", "--build", "build"],
    ):
        done = subprocess.run(
            command, cwd=other, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ValueError(f"bench: base {rev} must build, got:\n{done.stdout}{done.stderr}")


def _run(
    tree: Path, folder: Path, ops: Sequence[str], dtypes: Sequence[str], seconds: float
) -> dict[str, float]:
    """Milliseconds by case, of the native kernels of a tree."""
    result = folder / "result.json"
    command = [sys.executable, "-m", "bench", *ops, "--no-compile", "--seconds", str(seconds)]
    subprocess.run(
        [*command, "--dtypes", *dtypes, "--json", str(result)],
        cwd=folder,  # not here, where iv2kernels of this tree would come first
        env={**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{_ROOT}"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    return {
        f"{r['op']} {r['shape']} {r['dtype']} {part}": r[f"{part}_ms"]
        for r in rows
        if r["candidate"].startswith("native") and "wrong" not in r
        for part in ("forward", "both")
        if r[f"{part}_ms"] is not None
    }
