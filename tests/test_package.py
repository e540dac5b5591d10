"""The package as a stranger gets it: from the sdist, from a clone, twice, from another venv."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# One instruction set: what is tested is the way of installing.
# What is quick to build; this environment's own build has the rest.
ENVIRONMENT = os.environ | {"IV2_ISAS": "scalar", "IV2_CUDA": "0", "IV2_ISA": "", "PYTHONPATH": ""}
CHECK = (
    "import torch, iv2kernels as k; from iv2kernels import _C; "
    "print(_C.__file__, k.rms_norm(torch.ones(1, 4), torch.ones(4), impl='native').sum().item())"
)


def call(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def environment(path: Path) -> Path:
    """A venv that sees this one's torch, and its Python."""
    venv.create(path, with_pip=True)
    python = path / "bin" / "python"
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python


def clone(path: Path) -> Path:
    """The files that git has, as a stranger would get them."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path / name)
    return path


def installed_file(python: Path, elsewhere: Path) -> str:
    file, total = call(python, "-c", CHECK, cwd=elsewhere).split()
    assert float(total) == pytest.approx(4, abs=1e-3)
    return file


def test_installs_twice_from_a_clone_and_from_another_venv_and_from_the_sdist(tmp_path):
    tree = clone(tmp_path / "clone")
    first, second = environment(tmp_path / "first"), environment(tmp_path / "second")
    # An interrupted build of a wheel leaves this behind.
    info = f"iv2-{importlib.metadata.version('iv2')}.dist-info"
    (tree / "build" / f"bdist.{sysconfig.get_platform()}" / "wheel" / info).mkdir(parents=True)
    for python in (first, first, second):
        call(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", tree)
        assert str(python.parent.parent) in installed_file(python, tmp_path)
    # What pip left in the clone must not hide a missing build: the source tree has no _C.
    source_tree = subprocess.run(
        [first, "-c", CHECK.replace("from iv2kernels import _C; ", "").replace("_C.__file__", "0")],
        cwd=tree,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert source_tree.returncode != 0
    assert "build it with `pip install -e .`" in source_tree.stderr
    call(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path / "dist", tree)
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames()}
    assert {"CMakeLists.txt", "csrc/kernels.h", "csrc/cpu/vec.h", "csrc/bindings.cpp"} <= names
    assert {"iv2kernels/_C.pyi", "iv2kernels/py.typed", "LICENSE"} <= names
    call(second, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", sdist)
    assert str(second.parent.parent) in installed_file(second, tmp_path)
