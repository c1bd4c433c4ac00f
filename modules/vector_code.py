"""Machine code on vector registers: LLVM's builder with the operations that compiled attention and experts share.

Vectors hold :data:`LANES` float32 values. Addresses are integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core.cgutils import get_or_insert_function
from numba.core.codegen import get_host_cpu_features

_FEATURES = (get_host_cpu_features() if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES).split(",")

INSTRUCTIONS = "AVX-512" if "+avx512f" in _FEATURES else "AVX2" if {"+avx2", "+fma"} <= set(_FEATURES) else None
"""Instructions that the tiles are made for; None if the processor has neither."""

LANES = 16 if INSTRUCTIONS == "AVX-512" else 8
"""Values of one vector register."""
VECTOR = 4 * LANES
"""Bytes of a vector."""

FLOAT, INT32, INT64, SHORT = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(16)
FLOATS, INT32S, SHORTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES), ir.VectorType(SHORT, LANES)
ZEROS = ir.Constant(FLOATS, None)


def instructions_for(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return the vector instructions of the loops that compute such tensors; None if PyTorch's operations do."""
    return INSTRUCTIONS if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) else None


class VectorBuilder:
    """LLVM's builder with the operations that tiles and loops have in common; addresses are 64-bit integers."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def at(self, address: Any, offset: int) -> Any:
        """Return an address ``offset`` bytes further."""
        return self.builder.add(address, ir.Constant(INT64, offset)) if offset else address

    def load(self, address: Any, kind: Any = FLOATS, align: int = 4) -> Any:
        """Load a value."""
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        """Store a value."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = align

    def splat(self, value: Any) -> Any:
        """Return a vector with a float in every lane."""
        one = self.builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(INT32, 0))
        return self.builder.shuffle_vector(one, one, ir.Constant(INT32S, [0] * LANES))

    def splat_at(self, address: Any, offset: int = 0) -> Any:
        """Return a vector with the float at an address in every lane."""
        return self.splat(self.load(self.at(address, offset), FLOAT))

    def multiply_add(self, one: Any, other: Any, total: Any) -> Any:
        """Return ``one * other + total``, rounded once."""
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        function = get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{LANES}f32")
        return self.builder.call(function, [one, other, total])

    def add_at(self, address: Any, value: Any) -> None:
        """Add a value to the one at an address."""
        self.store(self.builder.fadd(self.load(address, value.type), value), address)

    def positive(self, values: Any) -> Any:
        """Return the ReLU of a vector; NaN stays NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", ZEROS, values), ZEROS, values)

    def masked(self, gradients: Any, outputs: Any) -> Any:
        """Return the gradients of a ReLU's input, given those of its output, and the output."""
        return self.builder.select(self.builder.fcmp_ordered("<=", outputs, ZEROS), ZEROS, gradients)

    def sum_of(self, values: Any) -> Any:
        """Return the sum of the lanes: the upper half is added to the lower half until one lane is left."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            kind = ir.VectorType(INT32, lanes)
            halves = [ir.Constant(kind, [*range(first, first + lanes)]) for first in (0, lanes)]
            values = self.builder.fadd(*(self.builder.shuffle_vector(values, values, half) for half in halves))
        return self.builder.extract_element(values, ir.Constant(INT32, 0))

    def sums_of(self, vectors: Sequence[Any]) -> Any:
        """Return the sums of as many vectors as one has lanes, in one vector; each is that of :meth:`sum_of`."""
        lanes, vectors = LANES, list(vectors)
        while lanes > 1:
            lanes //= 2
            # Each vector has several groups of lanes, of one of the given vectors each. Half of each group is added to
            # the other half, and the groups of two vectors go into one.
            firsts = [group * 2 * lanes + lane for group in range(LANES // lanes) for lane in range(lanes)]
            halves = [ir.Constant(INT32S, [first + half for first in firsts]) for half in (0, lanes)]
            vectors = [
                self.builder.fadd(*(self.builder.shuffle_vector(one, other, half) for half in halves))
                for one, other in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        return vectors[0]

    def repeat(self, count: Any, begin: Sequence[Any], step: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        """Emit a loop of at least one pass over some values, and return the values after the last pass."""
        builder = self.builder
        before, body, after = builder.block, builder.append_basic_block("repeat"), builder.append_basic_block("after")
        builder.branch(body)
        builder.position_at_end(body)
        number = builder.phi(INT64)
        state = [builder.phi(value.type) for value in begin]
        results = list(step(list(state)))
        following = self.at(number, 1)
        values = zip([number, *state], [ir.Constant(INT64, 0), *begin], [following, *results], strict=True)
        for phi, first, next_ in values:
            phi.add_incoming(first, before)
            phi.add_incoming(next_, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        return results
