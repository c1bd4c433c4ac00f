"""Compile the GPU search ahead of time, for GPUs that this machine need not have; prints one line of JSON a kernel.

A process of its own, because Triton decides once whether it compiles or interprets. ptxas comes with Triton.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modules.search import triton_kernel

CAPABILITIES = (80, 90)
ALIGNED = [["tt.divisibility", 16]]
"""Attribute that Triton gives to the address of a tensor that torch allocated: a multiple of 16 bytes."""


def compiled(
    kernel: Any, arguments: dict[str, str], constants: dict[str, int], capability: int, warps: int = 4
) -> dict[str, object]:
    """Compile a kernel and return what tells its quality."""
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    aligned = {(place,): ALIGNED for place, name in enumerate(arguments) if arguments[name].startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return {
        "kernel": result.metadata.name,
        "capability": capability,
        **constants,
        "cubin": len(result.asm["cubin"]),
        "shared": result.metadata.shared,
        "wide_loads": result.asm["ptx"].count(".v4.b32") + result.asm["ptx"].count(".v2.b32"),
    }


def main() -> None:
    """Compile each variant."""
    for capability in CAPABILITIES:
        pointers = {"first_of": "*i64", "stop_of": "*i64", "keys": "*i32", "longest": "i32", "out": "*i64"}
        blocks = {"BLOCK": triton_kernel.SELECTED}
        print(json.dumps(compiled(triton_kernel._select, {**pointers, "length": "i32"}, blocks, capability)))
        # Item ids are int64, author ids of old datasets int32; the second part may have another width.
        for vectors, parts, (width, width_2) in itertools.product(("*fp16", "*i8"), (1, 2), ((64, 16), (128, 64))):
            part = {"column": "*i64", "shift": "i32", "vectors": vectors, "rows": "i32", "queries": "*i64"}
            part_2 = {f"{name}_2": "*i32" if name == "column" else kind for name, kind in part.items()}
            runs = {"first_of": "*i64", "stop_of": "*i64"}
            constants = {"PARTS": parts, "WIDTH": width, "WIDTH_2": width_2, "BYTES": int(vectors == "*i8")}
            arguments = {**runs, **part, **part_2, "keys": "*i32", "longest": "i32"}
            blocks = {**constants, "BLOCK": triton_kernel.SCORED}
            print(json.dumps(compiled(triton_kernel._score, arguments, blocks, capability)))


if __name__ == "__main__":
    main()
