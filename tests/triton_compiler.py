"""Compiles Triton kernels ahead of time, for GPUs that need not be there, and looks at what came out."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVIDIA = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 89, 90, 120)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64)}
TARGETS = NVIDIA | AMD
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel, as assembly.

    Attributes:
        assembly: PTX, or AMD's assembly.
        cubin: NVIDIA's machine code.
        num_registers: per thread.
        stack_nbytes: per thread; it is where spills go.
    """

    assembly: str
    cubin: bytes | None
    num_registers: int
    stack_nbytes: int

    @property
    def machine_code(self) -> str:
        """Return what runs, disassembled; AMD's assembly is that already."""
        return self.assembly if self.cubin is None else _dump(self.cubin, "--dump-sass")

    def count(self, pattern: str) -> int:
        """Return how often the assembly has the regular expression."""
        return len(re.findall(pattern, self.assembly))


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    target: str,
    num_warps: int,
    *,
    fuses: bool = False,
) -> Compiled:
    """Compile a kernel whose pointers are multiples of 16, as torch's allocations are.

    Args:
        kernel: what ``triton.jit`` made.
        signature: types of the arguments that are no constants, such as ``*i64``.
        constants: the others.
        target: a key of TARGETS.
        num_warps: warps per program.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    source = ASTSource(kernel, types, constexprs=dict(constants), attrs=attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": fuses}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target in AMD:
        assembly = compiled.asm["amdgcn"]
        registers = int(_one(r"\.vgpr_count:\s+(\d+)", assembly))
        return Compiled(assembly, None, registers, int(_one(r"\.private_segment_fixed_size:\s+(\d+)", assembly)))
    resources = _dump(compiled.asm["cubin"], "--dump-resource-usage")
    stack = int(_one(r"STACK:(\d+)", resources)) + int(_one(r"LOCAL:(\d+)", resources))
    registers = int(_one(r"REG:(\d+)", resources))
    return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], registers, stack)


def _dump(cubin: bytes, what: str) -> str:
    """Return what cuobjdump, which comes with Triton, says of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = os.environ["PATH"] + os.pathsep + str(_TOOLS)  # cuobjdump calls nvdisasm
        command = [_TOOLS / "cuobjdump", what, file.name]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        ).stdout


def _one(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text[:2000]}"
    return found.group(1)
