"""No instruction set may leak into another's code.

A weak symbol (an inline function, a template's instance, a vague static) exists once in the linked
module: the linker may pick the AVX-512 copy for everyone. So the objects of the kernels may define
none, and the scalar objects may hold no wide register. They are compiled here without optimisation,
which inlines nothing away: a file that is clean so is clean in every build.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if p.name != "isa.cpp")
ISAS = ["scalar", "avx512_bf16"] if platform.machine() in ("x86_64", "AMD64") else ["scalar"]
COMPILER = next((c for c in map(shutil.which, ("c++", "g++", "clang++")) if c), None)

needs_tools = pytest.mark.skipif(
    COMPILER is None or not shutil.which("nm") or not shutil.which("objdump"),
    reason="reads object files: needs a C++ compiler, nm and objdump",
)


def flags(isa: str) -> list[str]:
    """What CMakeLists.txt compiles the kernels of an instruction set with."""
    text = (ROOT / "CMakeLists.txt").read_text()
    lists = dict(re.findall(r"set\((\w+) ([^)]*)\)", text))
    expanded = re.sub(r"\$\{(\w+)\}", lambda m: lists[m[1]], lists[f"flags_{isa}"])
    options = re.search(r"target_compile_options\(cpu_\$\{isa\} PRIVATE ([^)]*)\)", text)
    assert options
    common = [option for option in options[1].split() if option.startswith("-")]
    assert "-ffp-contract=off" in common
    return [*expanded.split(), *common, f"-DIV2_ISA={isa}", "-std=c++17", "-fPIC", "-fopenmp"]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_to(folder: Path, source: Path, options: list[str]) -> Path:
    target = folder / f"{source.stem}.o"
    run(COMPILER or "", *options, "-O0", "-fvisibility=hidden", "-c", source, "-o", target)
    return target


def defined(target: Path) -> list[tuple[str, str]]:
    """Kind (nm's letter) and name of each symbol that an object file defines."""
    lines = run("nm", "--demangle", "--defined-only", target).splitlines()
    return [(line.split()[1], line.split(maxsplit=2)[2]) for line in lines]


@needs_tools
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_kernels_define_their_own_symbols_only(source, isa, tmp_path):
    target = compile_to(tmp_path, source, flags(isa))
    symbols = defined(target)
    weak = [name for kind, name in symbols if kind in "WwVvuC"]
    assert not weak, f"{source.name} defines weak symbols: {weak}"
    shared = [name for kind, name in symbols if kind.isupper()]
    assert shared
    stray = [name for name in shared if not name.startswith(f"iv2::{isa}::")]
    assert not stray, f"{source.name} defines symbols that the other builds define too: {stray}"
    if isa == "scalar" and len(ISAS) > 1:
        code = run("objdump", "-d", "--no-show-raw-insn", target)
        assert re.search(r"%[xyz]mm", code), "no register was read: objdump prints another syntax"
        assert not re.search(r"%[yz]mm\d|\tv[a-z]+[ps][sd] ", code)


@needs_tools
@pytest.mark.parametrize(
    "text",
    [
        "inline int f() { return 1; } auto g() { return f; }",
        "template <class T> T f() { return 1; } int g() { return f<int>(); }",
        "#include <algorithm>\nint g(int a, int b) { return std::max(a, b); }",
        "inline int& f() { static int x; return x; } int g() { return f(); }",
    ],
)
def test_the_check_sees_weak_symbols(text, tmp_path):
    source = tmp_path / "weak.cpp"
    source.write_text(text)
    kinds = [kind for kind, _ in defined(compile_to(tmp_path, source, flags("scalar")))]
    assert set(kinds) & set("WVu")


@needs_tools
@pytest.mark.skipif(len(ISAS) == 1, reason="x86 registers")
def test_the_check_sees_wide_registers(tmp_path):
    source = tmp_path / "wide.cpp"
    source.write_text("#include <immintrin.h>\n__m256 g(__m256 a) { return _mm256_add_ps(a, a); }")
    target = compile_to(tmp_path, source, [*flags("scalar"), "-mavx2"])
    assert re.search(r"%ymm\d", run("objdump", "-d", target))
