"""What a compiled kernel takes of a GPU, read from its machine code.

No measurement: registers, memory and instructions are counted in what the assembler wrote, with the
tools in Triton's wheel; how many blocks run at once follows from the limits of each architecture.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

Usage = dict[str, int]


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (a compute unit's SIMD for registers on AMD)."""

    warps: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
    "sm_100": Limits(64, 32, 228 << 10),
    "sm_120": Limits(48, 24, 100 << 10),
    "gfx942": Limits(32, 16, 64 << 10),
}
_REGISTERS = 65536
_BLOCK_SHARED = 1024  # that NVIDIA's driver takes for itself

# Opcodes at the start of an instruction, after its predicate.
_NVIDIA = {
    "tensor": r"[HIQO]MMA|[HIQ]GMMA|UTC[A-Z]*MMA",
    "async": r"LDGSTS|UTMALDG|UBLKCP",
    "local": r"LDL|STL",
    "global": r"LDG|STG|LDGSTS",
    "wide": r"(?:LDG|STG|LDGSTS)\S*\.128",
    "atomic": r"RED|REDG|ATOM|ATOMG",
}
_AMD = {
    "tensor": r"v_s?mfma\w*",
    "async": r"(?:global|buffer)_load_lds\w*",
    "local": r"scratch_(?:load|store)\w*",
    "global": r"(?:global|buffer|flat)_(?:load|store)\w*",
    "wide": r"(?:global|buffer|flat)_(?:load|store)_(?:dwordx4|b128)",
    "atomic": r"(?:global|buffer|flat)_atomic\w*",
}


def usage(arch: str, compiled: Any) -> Usage:
    """Registers, stack, shared memory, warps, blocks at once, and counts of instructions."""
    read = _amd if arch.startswith("gfx") else _nvidia
    found = read(compiled)
    found |= {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    return found | {"blocks": blocks(arch, found)}


def blocks(arch: str, found: Usage) -> int:
    """Blocks that run on a multiprocessor at once."""
    limits, warps = LIMITS[arch], found["warps"]
    if arch.startswith("gfx"):
        # 512 registers in each lane of each of four SIMDs, given out eight at a time
        by_registers = 4 * min(512 // _up(max(found["registers"], 1), 8), limits.warps // 4)
        shared = found["shared"]
    else:
        by_registers = _REGISTERS // _up(32 * max(found["registers"], 1), 256) // 4 * 4
        shared = found["shared"] + _BLOCK_SHARED
    at_once = min(by_registers, limits.warps) // warps
    return min(at_once, limits.blocks, limits.shared // shared if shared else at_once)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _count(opcodes: list[str], patterns: dict[str, str]) -> Usage:
    return {
        name: sum(1 for opcode in opcodes if re.fullmatch(rf"(?:{pattern})(?:\.\S*)?", opcode))
        for name, pattern in patterns.items()
    }


def _nvidia(compiled: Any) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, code = (
            subprocess.run(
                [_TOOLS / "cuobjdump", option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", resources).groups()
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.M)
    assert opcodes, code[:2000]
    return {"registers": int(registers), "stack": int(stack)} | _count(opcodes, _NVIDIA)


def _amd(compiled: Any) -> Usage:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", code)[-1])

    opcodes = re.findall(r"^\s+([a-z]\w+)", code, re.M)
    found = {"registers": field("vgpr_count"), "stack": field("private_segment_fixed_size")}
    found |= _count(opcodes, _AMD)
    # scalar registers spill to lanes of vector registers, which are counted, or else to the stack
    found["local"] += field("vgpr_spill_count")
    return found
