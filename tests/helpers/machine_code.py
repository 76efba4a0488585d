"""Kernels compiled for GPUs that are not there, and what their code says."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDE_LOAD, WIDE_STORE = r"\bld\.global[\w.:]*\.v4\.b32", r"\bst\.global[\w.:]*\.v4\.b32"
LOAD, STORE = r"\bld\.global", r"\bst\.global"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class MachineCode:
    """The intermediate code of a kernel, and the bytes that each thread spills to memory."""

    ptx: str
    spilled_bytes: int

    def count(self, pattern: str) -> int:
        """How often an instruction is in the code."""
        return len(re.findall(pattern, self.ptx))


def compiled(
    kernel: Any,
    signature: dict[str, str],
    constants: Any,
    aligned: bool,
    arch: int,
    num_warps: int,
    path: Path,
    num_stages: int = 3,
) -> MachineCode:
    """The kernel for a GPU of compute capability `arch` (80, 90), with all arguments divisible by 16 if `aligned`."""
    names = [*signature, *constants]
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]] for name in signature if aligned or "*" in signature[name]
    }
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    binary = path / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    spills = [int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)]
    assert len(spills) == 2, usage
    return MachineCode(made.asm["ptx"], sum(spills))


def far_rows(width: int) -> torch.Tensor:
    """Three rows 2**30 elements apart; of the memory between them nothing is touched, and so nothing is taken."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return torch.empty(2**31 + width, dtype=torch.bfloat16).as_strided((3, width), (2**30, 1))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def ulps(dtype: torch.dtype) -> float:
    """How far a rounded number may be from the exact one: Triton's interpreter truncates to bfloat16, GPUs round."""
    return 1.0 if dtype == torch.bfloat16 else 0.5
