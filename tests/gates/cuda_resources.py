"""`python -m tests.gates.cuda_resources [FILE ...]`: compile csrc/cuda, and hold it to budgets.

Each csrc/cuda/<op>.cu is compiled by nvcc for each architecture, and what every kernel in it takes
is read from the machine code. None may spill; the rest may only become better than
cuda_budgets.json. Without nvcc, or without cuobjdump (on the PATH, beside nvcc or in Triton's
wheel), this says so and passes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_name("cuda_budgets.json")
FILES = {p.stem: p for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if p.stem != "device"}
ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")

# Opcodes at the start of an instruction, after its predicate.
INSTRUCTION = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
OPCODES = {
    "tensor": r"[HIQO]MMA|[HIQ]GMMA|UTC[A-Z]*MMA",
    "async": r"LDGSTS|UTMALDG|UBLKCP",
    "local": r"LDL|STL",
    "global": r"LDG|STG|LDGSTS",
    "wide": r"(?:LDG|STG|LDGSTS)\S*\.128",
}
# More is worse, more is better. Warps and blocks follow from the launch, not from the code.
COSTS = ("registers", "stack", "shared", "local")
GAINS = ("tensor", "async", "wide")
ZERO = ("stack", "local")

Usage = dict[str, int]


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    triton = importlib.util.find_spec("triton")
    folders = [
        Path(nvcc).resolve().parent if nvcc else None,
        Path(os.environ["CUDA_HOME"]) / "bin" if os.environ.get("CUDA_HOME") else None,
        Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        if triton and triton.origin
        else None,
    ]
    found = shutil.which(name)
    for folder in folders:
        found = found or shutil.which(name, path=str(folder)) if folder else found
    return found


def run(*command: str | Path) -> str:
    """Its output; an error is an AssertionError with it."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def compile_cubin(source: Path, arch: str, folder: Path) -> Path:
    """The machine code of a file, with the flags of CMakeLists.txt."""
    cubin = folder / f"{source.stem}-{arch}.cubin"
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Werror=all-warnings", f"-arch={arch}"]
    run(tool("nvcc") or "", *flags, "-cubin", source, "-o", cubin)
    return cubin


def _short(mangled: str) -> str:
    """`fwd_kernel<bf16, float, 8, 1>` of a mangled name."""
    name = run("c++filt", mangled).strip().removeprefix("void ")
    name = re.sub(
        r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|iv2::cuda::|\(\w+\)(?=\d)", "", name
    )
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            end = i
            break
    return name[:end]


def usages(cubin: Path) -> Iterator[tuple[str, Usage]]:
    """What each kernel of a cubin takes."""
    cuobjdump = tool("cuobjdump") or ""
    resources = run(cuobjdump, "--dump-resource-usage", cubin)
    code = re.split(r"^\s*Function : (\S+)$", run(cuobjdump, "--dump-sass", cubin), flags=re.M)
    instructions = dict(zip(code[1::2], code[2::2], strict=True))
    entry = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = re.findall(entry, resources)
    assert found, resources
    for mangled, registers, stack, shared, _ in found:
        opcodes = re.findall(INSTRUCTION, instructions[mangled], re.M)
        usage = {"registers": int(registers), "stack": int(stack), "shared": int(shared)}
        for name, pattern in OPCODES.items():
            usage[name] = sum(bool(re.fullmatch(rf"(?:{pattern})(?:\.\S*)?", o)) for o in opcodes)
        yield _short(mangled), usage


def complaints(name: str, found: Usage, budget: Usage | None) -> list[str]:
    """What is wrong with a kernel."""
    wrong = [f"{name}: {key} must be 0, got {found[key]}" for key in ZERO if found[key]]
    for keys, sign, most in ((COSTS, 1, "at most"), (GAINS, -1, "at least")):
        wrong += [
            f"{name}: {key} must be {most} {budget[key]}, got {found[key]}"
            for key in keys
            if budget is not None and key not in ZERO and sign * found[key] > sign * budget[key]
        ]
    return wrong


def tighter(found: Usage, budget: Usage | None) -> Usage:
    """The better of both."""
    if budget is None:
        return found
    costs = {key: min(found[key], budget[key]) for key in COSTS}
    return found | costs | {key: max(found[key], budget[key]) for key in GAINS}


def load(path: Path = BUDGETS) -> tuple[str | None, dict[str, Usage]]:
    """The version of nvcc that the budgets are of, and the budgets."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found.pop("nvcc", None), found


def save(version: str, budgets: dict[str, Usage], path: Path = BUDGETS) -> None:
    """One line for each kernel and architecture."""
    lines = [f'"nvcc": {json.dumps(version)}']
    for name, budget in sorted(budgets.items()):
        lines.append(f"{json.dumps(name)}: {json.dumps(budget, sort_keys=True)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def measure(task: tuple[str, str]) -> list[tuple[str, Usage]]:
    """The kernels of a file on an architecture, by name."""
    file, arch = task
    with tempfile.TemporaryDirectory() as folder:
        return list(usages(compile_cubin(FILES[file], arch, Path(folder))))


def _row(kernel: str, arch: str, found: Usage) -> str:
    return (
        f"{kernel:64s} {arch:7s} {found['registers']:9d} {found['shared']:7d} "
        f"{found['tensor']:6d} {found['async']:5d} "
        f"{found['wide']:4d}/{found['global']:<4d} {found['local']:5d}"
    )


def _options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gates.cuda_resources", description=__doc__
    )
    parser.add_argument("files", nargs="*", choices=[*FILES, []], default=[])
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    jobs = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=jobs, help="files at a time")
    parser.add_argument("--tighten", action="store_true", help="write what is new or better")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """The number of complaints, at most 1."""
    options = _options(given)
    for name in ("nvcc", "cuobjdump", "c++filt"):
        if tool(name) is None:
            print(f"csrc/cuda was not checked: there is no {name}")
            return 0
    version = re.findall(r"release (\S+),", run(tool("nvcc") or "", "--version"))[0]
    known_version, known = load()
    comparable = known_version in (None, version)
    if not comparable:
        print(f"budgets are of nvcc {known_version}, this is {version}: only zeros count")
    print(f"{'kernel':64s} {'arch':7s} registers  shared tensor async wide/all  local")
    wrong, measured = [], {}
    tasks = [(file, arch) for file in options.files or FILES for arch in options.arch]
    with ThreadPoolExecutor(options.jobs) as pool:  # each waits for its nvcc
        for (file, arch), kernels in zip(tasks, pool.map(measure, tasks), strict=True):
            unused = {n for n in known if n.startswith(f"{file} ") and n.endswith(f", {arch}")}
            for kernel, found in kernels:
                name = f"{file} {kernel}, {arch}"
                unused.discard(name)
                budget = known.get(name) if comparable else None
                measured[name] = tighter(found, budget)
                print(_row(f"{file} {kernel}", arch, found), flush=True)
                if comparable and budget is None and not options.tighten:
                    wrong.append(f"{name}: has no budget; run with --tighten to take it")
                wrong += complaints(name, found, budget)
            known = {n: b for n, b in known.items() if n not in unused}
            if options.tighten:  # at once: the next file takes its time
                save(version, known | measured)
            else:
                wrong += [f"{name}: has a budget, but no kernel" for name in sorted(unused)]
    print("\n".join(wrong))
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
