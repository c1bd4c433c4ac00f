"""Compiled layers of several networks of one shape for CPUs: the function of ``modules/multitask.py``'s ``BatchedMLP``.

A block of rows goes through all layers of a network while its values are in the cache. Bias and ReLU are applied to a
tile of a product in its registers, and so are the ReLU's mask and the sum of the gradients of the bias in the backward
pass. Networks that read the same input add up its gradient in place, so there is no copy of it for each network.

All sums have a fixed order. An output depends on its own row alone. The gradients of a network are summed over a part
of the rows, and these sums are added in the order of parts and networks. So no bit depends on the number of threads. A
thread has memory for one part of one network, however many networks there are.

Widths are padded with zeros to multiples of ``LANES``, and rows to multiples of ``STEPS``; all is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from modules import product_tiles, vector_code, vector_loops
from modules.compiled import compiled
from modules.product_tiles import STEPS, make_product
from modules.threads import each_part, in_turns
from modules.vector_code import LANES, VECTOR, instructions_for
from modules.vector_loops import add_vectors, copy, copy_masked, fill

BLOCK_ROWS = 64
"""Rows that go through the layers together."""
PART_ROWS = 512
"""Rows of a part of the batch; at least a block."""

NOTHING = np.float32(0)

layer_forward = make_product(False, product_tiles.from_bias, product_tiles.store_positive)
"""``c = relu(a b + x)``."""
layer_backward = make_product(False, product_tiles.from_zeros, product_tiles.store_masked)
"""``c = a b`` where ``c`` was positive, else 0; ``x`` gets the sum over the rows."""
weight_backward = make_product(True, product_tiles.from_zeros, product_tiles.add)
"""``c += a^T b``."""
input_backward = make_product(False, product_tiles.from_zeros, product_tiles.store)
"""``c = a b``."""


class ExpertArguments(NamedTuple):
    """Addresses and sizes of the two loops, as whole numbers; strides are in bytes.

    Attributes:
        networks, rows: numbers of networks, and of rows, a multiple of ``STEPS``.
        block_rows: rows of a block, another multiple.
        part_rows: rows of a part, a multiple of those of a block.
        inputs, input_stride, input_row: inputs, from one to the next, and from row to row.
        out, out_stride, out_row: outputs of the networks.
        grad_out, grad_stride, grad_row: their gradients.
        grad_inputs: gradients of the inputs, one after another, without gaps.
    """

    networks: int
    rows: int
    block_rows: int
    part_rows: int
    inputs: int
    input_stride: int
    input_row: int
    out: int
    out_stride: int
    out_row: int
    grad_out: int = 0
    grad_stride: int = 0
    grad_row: int = 0
    grad_inputs: int = 0


@compiled("experts and towers", vector_code, product_tiles, vector_loops, nogil=True)
def forward_blocks(
    begin: int,
    end: int,
    job: ExpertArguments,
    reads: np.ndarray,
    widths: np.ndarray,
    weights: np.ndarray,
    biases: np.ndarray,
    hidden: np.ndarray,
) -> None:
    """Write the outputs of all layers for blocks ``begin`` to ``end`` of the rows.

    Args:
        begin: first block.
        end: block after the last one.
        job: addresses and sizes.
        reads: number of the input of each network.
        widths: padded widths of the input and of each layer.
        weights: address of each layer's weights ``[networks, width before, width]``.
        biases: address of each layer's biases ``[networks, width]``.
        hidden: address of the outputs ``[networks, rows, width]`` of each layer but the last.
    """
    last = len(weights) - 1
    for network in range(job.networks):
        for block in range(begin, end):
            first = block * job.block_rows
            rows = min(job.block_rows, job.rows - first)
            source, stride = job.inputs + reads[network] * job.input_stride + first * job.input_row, job.input_row
            for layer in range(last + 1):
                before, width = widths[layer], 4 * widths[layer + 1]
                weight, bias = weights[layer] + network * before * width, biases[layer] + network * width
                target, target_row = job.out + network * job.out_stride + first * job.out_row, job.out_row
                if layer < last:
                    target, target_row = hidden[layer] + (network * job.rows + first) * width, width
                layer_forward(
                    source, stride, weight, width, before, target, target_row, rows, width // VECTOR, bias, 0, 0, 0, 0
                )
                source, stride = target, target_row


@compiled("experts and towers", vector_code, product_tiles, vector_loops, nogil=True)
def backward_part(
    piece: int,
    job: ExpertArguments,
    reads: np.ndarray,
    widths: np.ndarray,
    transposed: np.ndarray,
    hidden: np.ndarray,
    memory: int,
    place: np.ndarray,
) -> None:
    """Write the gradients of one network, summed over one part of the rows.

    Args:
        piece: number of the part, times the number of networks, plus the number of the network.
        job: addresses and sizes.
        reads: number of the input of each network.
        widths: padded widths of the input and of each layer.
        transposed: address of each layer's weights ``[networks, width, width before]``.
        hidden: address of the outputs ``[networks, rows, width]`` of each layer but the last.
        memory: memory of this thread.
        place: places in it as of :func:`places_of`.
    """
    part, network = piece // job.networks, piece % job.networks
    last = len(transposed) - 1
    begin, end = part * job.part_rows, min((part + 1) * job.part_rows, job.rows)
    if begin >= end:
        return
    of_inputs, blocks = memory + place[2 * last + 2], place[2 * last + 3]
    fill(memory, 0, 0, 0, place[2 * last + 2] // VECTOR, NOTHING)
    for first in range(begin, end, job.block_rows):
        rows = min(job.block_rows, end - first)
        grad = memory + blocks
        other = memory + place[2 * last + 4]
        width = 4 * widths[last + 1]
        out = job.out + network * job.out_stride + first * job.out_row
        grad_out = job.grad_out + network * job.grad_stride + first * job.grad_row
        sums = memory + place[2 * last + 1]
        for row in range(rows):
            copy_masked(
                grad + row * width,
                grad_out + row * job.grad_row,
                out + row * job.out_row,
                sums,
                width // VECTOR,
                NOTHING,
            )
        for layer in range(last, 0, -1):
            before = widths[layer]
            narrow = 4 * before
            # The outputs are kept for another backward pass: gradients replace a copy of them.
            outputs = hidden[layer - 1] + (network * job.rows + first) * narrow
            copy(other, outputs, 0, 0, rows * narrow // VECTOR, NOTHING)
            target = memory + place[layer]
            weight_backward(other, narrow, grad, width, rows, target, width, before, width // VECTOR, 0, 0, 0, 0, 0)
            weight, sums = transposed[layer] + network * before * width, memory + place[last + layer]
            steps = widths[layer + 1]
            layer_backward(grad, width, weight, narrow, steps, other, narrow, rows, narrow // VECTOR, sums, 0, 0, 0, 0)
            grad, other, width = other, grad, narrow
        before = widths[0]
        narrow = 4 * before
        source = job.inputs + reads[network] * job.input_stride + first * job.input_row
        target = memory + place[0]
        weight_backward(source, job.input_row, grad, width, rows, target, width, before, width // VECTOR, 0, 0, 0, 0, 0)
        weight, target = transposed[0] + network * before * width, of_inputs + (first - begin) * narrow
        input_backward(grad, width, weight, narrow, widths[1], target, narrow, rows, narrow // VECTOR, 0, 0, 0, 0, 0)


@compiled("experts and towers", vector_code, product_tiles, vector_loops, nogil=True)
def add_part(
    piece: int,
    job: ExpertArguments,
    reads: np.ndarray,
    widths: np.ndarray,
    grads: np.ndarray,
    memory: int,
    place: np.ndarray,
) -> None:
    """Add the gradients that :func:`backward_part` has written to those of all rows.

    Args:
        piece: number of the part and network, as there.
        job: addresses and sizes.
        reads: number of the input of each network.
        widths: padded widths of the input and of each layer.
        grads: address of the gradients ``[networks, width before, width]`` of each layer's weights, and then of those
            ``[networks, width]`` of each layer's biases.
        memory: memory of this thread.
        place: places in it.
    """
    part, network = piece // job.networks, piece % job.networks
    begin, end = part * job.part_rows, min((part + 1) * job.part_rows, job.rows)
    if begin >= end:
        return
    for number in range(len(grads)):
        vectors = (place[number + 1] - place[number]) // VECTOR
        add_vectors(grads[number] + network * vectors * VECTOR, memory + place[number], 0, 0, vectors, NOTHING)
    row = 4 * widths[0]
    target = job.grad_inputs + (reads[network] * job.rows + begin) * row
    add_vectors(target, memory + place[len(grads)], 0, 0, (end - begin) * row // VECTOR, NOTHING)


def places_of(widths: Sequence[int], block_rows: int, part_rows: int) -> np.ndarray:
    """Return the places in a thread's memory, in bytes, and at last the number of all bytes.

    They are the gradients of one network's weights, layer by layer, of its biases, and of the inputs of a part; and two
    blocks of gradients.

    Args:
        widths: padded widths of the input and of each layer.
        block_rows: rows of a block.
        part_rows: rows of a part.
    """
    weights = [before * width for before, width in pairwise(widths)]
    sizes = [*weights, *widths[1:], part_rows * widths[0], *[block_rows * max(widths)] * 2]
    return 4 * np.cumsum([0, *sizes])


class CompiledExperts(torch.autograd.Function):
    """Layers with ReLU of several networks by the compiled loops, with the results of the plain operations."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, reads: Tensor, *parameters: Tensor) -> Tensor:
        """Return the outputs ``[networks, batch, width]``, a view of ``[batch, networks, width]``.

        Args:
            ctx: memory for the backward pass.
            inputs: ``[inputs, batch, width]`` float32.
            reads: input of each network, ``[networks]`` int64, on the CPU.
            parameters: weights ``[networks, width before, width]`` of all layers, and then biases ``[networks, 1,
                width]`` of all layers.

        Raises:
            ValueError: the inputs do not fit the networks; the loops would read beyond them.
        """
        compile_loops()
        layers = len(parameters) // 2
        networks, batch = len(reads), inputs.shape[1]
        if reads.dtype != torch.int64 or (networks and not 0 <= int(reads.min()) <= int(reads.max()) < len(inputs)):
            raise ValueError(f"{networks} networks read inputs of {len(inputs)}, but not by their numbers")
        if inputs.shape[2] != parameters[0].shape[1] or any(value.dtype != inputs.dtype for value in parameters):
            raise ValueError(
                f"networks with {parameters[0].dtype} weights for inputs of width {parameters[0].shape[1]}, but the "
                f"inputs are {inputs.dtype} and of width {inputs.shape[2]}"
            )
        padded = _padded(inputs)
        weights = [_padded_matrices(weight) for weight in parameters[:layers]]
        biases = [functional.pad(bias[:, 0], (0, -bias.shape[2] % LANES)).contiguous() for bias in parameters[layers:]]
        rows, widths = padded.shape[1], [weight.shape[1] for weight in weights] + [weights[-1].shape[2]]
        out = inputs.new_empty(rows, networks, widths[-1])
        hidden = [inputs.new_empty(networks, rows, width) for width in widths[1:-1]]
        job = _arguments(padded, out, networks)
        arrays = [reads.numpy(), np.array(widths), *(_addresses(tensors) for tensors in (weights, biases, hidden))]
        each_part(lambda begin, end: forward_blocks(begin, end, job, *arrays), -(-rows // BLOCK_ROWS))
        ctx.save_for_backward(padded, reads, out, *hidden, *parameters[:layers])
        ctx.layers, ctx.shape = layers, inputs.shape
        return out.transpose(0, 1)[:, :batch, : parameters[layers - 1].shape[2]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments of ``forward``."""
        padded, reads, out, *others = ctx.saved_tensors
        hidden, parameters = others[: ctx.layers - 1], others[ctx.layers - 1 :]
        transposed = [_padded_matrices(weight.transpose(1, 2)) for weight in parameters]
        networks, rows = len(reads), padded.shape[1]
        widths = [weight.shape[2] for weight in transposed] + [transposed[-1].shape[1]]
        grad_inputs = padded.new_zeros(padded.shape)
        grad_weights = [padded.new_zeros(weight.transpose(1, 2).shape) for weight in transposed]
        grad_biases = [padded.new_zeros(networks, width) for width in widths[1:]]
        gradient = _padded(grad_out)
        job = _arguments(padded, out, networks)._replace(
            grad_out=gradient.data_ptr(),
            grad_stride=4 * gradient.stride(0),
            grad_row=4 * gradient.stride(1),
            grad_inputs=grad_inputs.data_ptr(),
        )
        inputs, sizes, totals = reads.numpy(), np.array(widths), _addresses([*grad_weights, *grad_biases])
        weights, outputs = _addresses(transposed), _addresses(hidden)
        place = places_of(widths, BLOCK_ROWS, job.part_rows)

        def compute(piece: int, memory: Tensor) -> None:
            backward_part(piece, job, inputs, sizes, weights, outputs, memory.data_ptr(), place)

        def add(piece: int, memory: Tensor) -> None:
            add_part(piece, job, inputs, sizes, totals, memory.data_ptr(), place)

        pieces = networks * -(-rows // job.part_rows)
        in_turns(compute, add, pieces, lambda: padded.new_empty(int(place[-1]) // 4))
        of_weights = [
            grads[:, : weight.shape[1], : weight.shape[2]]
            for grads, weight in zip(grad_weights, parameters, strict=True)
        ]
        of_biases = [grads[:, None, : weight.shape[2]] for grads, weight in zip(grad_biases, parameters, strict=True)]
        _, batch, width = ctx.shape
        return grad_inputs[:, :batch, :width], None, *of_weights, *of_biases


def computes(values: Tensor) -> bool:
    """True if the loops compute such values on this machine."""
    return values.dtype == torch.float32 and instructions_for(values.device) is not None


@cache
def compile_loops() -> None:
    """Compile the loops in this process, or load them from numba's cache."""
    job = ExpertArguments(*[0] * len(ExpertArguments._fields))._replace(networks=1, block_rows=STEPS)
    none = np.zeros(1, np.int64)
    calls: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...] = (
        (forward_blocks, (0, 0, job, *[none] * 5)),
        (backward_part, (0, job, *[none] * 4, 0, none)),
        (add_part, (0, job, *[none] * 3, 0, none)),
    )
    for loop, arguments in calls:
        loop(*arguments)


def _arguments(inputs: Tensor, out: Tensor, networks: int) -> ExpertArguments:
    """Return the arguments of the forward pass for padded inputs, and outputs ``[rows, networks, width]``."""
    return ExpertArguments(
        networks=networks,
        rows=inputs.shape[1],
        block_rows=BLOCK_ROWS,
        part_rows=max(PART_ROWS, BLOCK_ROWS),
        inputs=inputs.data_ptr(),
        input_stride=4 * inputs.stride(0),
        input_row=4 * inputs.stride(1),
        out=out.data_ptr(),
        out_stride=4 * out.stride(1),
        out_row=4 * out.stride(0),
    )


def _padded(values: Tensor) -> Tensor:
    """Return ``[n, rows, width]`` with padded rows and widths, and the values of a row next to each other."""
    missing = (0, -values.shape[2] % LANES, 0, -values.shape[1] % STEPS)
    if any(missing):
        return functional.pad(values, missing)
    return values if values.stride(2) == 1 else values.contiguous()


def _padded_matrices(weights: Tensor) -> Tensor:
    """Return matrices ``[networks, rows, columns]`` without gaps, padded in both directions."""
    missing = (0, -weights.shape[2] % LANES, 0, -weights.shape[1] % LANES)
    return (functional.pad(weights, missing) if any(missing) else weights).contiguous()


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([tensor.data_ptr() for tensor in tensors], np.int64)
