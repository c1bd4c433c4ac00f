"""Compiled layers of several networks of one shape for CPUs: the function of ``modules/multitask.py``'s ``BatchedMLP``.

A block of rows goes through all layers of a network while its values are in the cache. Bias and ReLU are applied to a
tile of a product in its registers, and so are the ReLU's mask and the sum of the gradients of the bias in the backward
pass. Networks that read the same input add up its gradient in place, so there is no copy of it for each network.

All sums have a fixed order. An output depends on its own row alone. Gradients of parameters are summed over the rows of
each thread, and then over the threads in their order, so they are the same in every run with as many threads.

Widths are padded with zeros to multiples of ``LANES``, and rows to multiples of ``STEPS``; all is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from modules import product_tiles, vector_code, vector_loops
from modules.compiled import compile_now, compiled
from modules.product_tiles import STEPS, make_product
from modules.search.search import each_part
from modules.vector_code import LANES, VECTOR, instructions_for
from modules.vector_loops import copy, copy_masked

BLOCK_ROWS = 64
"""Rows that go through the layers together."""

NOTHING = np.float32(0)

layer_forward = make_product(False, product_tiles.from_bias, product_tiles.store_positive)
"""``c = relu(a b + x)``."""
layer_backward = make_product(False, product_tiles.from_zeros, product_tiles.store_masked)
"""``c = a b`` where ``c`` was positive, else 0; ``x`` gets the sum over the rows."""
weight_backward = make_product(True, product_tiles.from_zeros, product_tiles.add)
"""``c += a^T b``."""
input_backward = make_product(False, product_tiles.from_zeros, product_tiles.add)
"""``c += a b``."""


class ExpertArguments(NamedTuple):
    """Addresses and sizes of the two loops, as whole numbers; strides are in bytes.

    Attributes:
        networks, rows: numbers of networks, and of rows, a multiple of ``STEPS``.
        block_rows: rows of a block, another multiple.
        parts: parts of the batch that have gradients of their own.
        inputs, input_stride, input_row: inputs, from one to the next, and from row to row.
        out, out_stride, out_row: outputs of the networks.
        grad_out, grad_stride, grad_row: their gradients.
        grad_inputs: gradients of the inputs, one after another, without gaps.
        scratch, scratch_bytes: memory of the first part, and bytes of that of each part.
    """

    networks: int
    rows: int
    block_rows: int
    parts: int
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
    scratch: int = 0
    scratch_bytes: int = 0


@compiled(vector_code, product_tiles, vector_loops, nogil=True)
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


@compiled(vector_code, product_tiles, vector_loops, nogil=True)
def backward_parts(
    begin: int,
    end: int,
    job: ExpertArguments,
    reads: np.ndarray,
    widths: np.ndarray,
    transposed: np.ndarray,
    hidden: np.ndarray,
    grad_weights: np.ndarray,
    grad_biases: np.ndarray,
) -> None:
    """Add the gradients of parts ``begin`` to ``end`` of the rows to those of the inputs and of the parts' parameters.

    Args:
        begin: first part.
        end: part after the last one.
        job: addresses and sizes.
        reads: number of the input of each network.
        widths: padded widths of the input and of each layer.
        transposed: address of each layer's weights ``[networks, width, width before]``.
        hidden: address of the outputs ``[networks, rows, width]`` of each layer but the last.
        grad_weights: address of the gradients ``[parts, networks, width before, width]`` of each layer's weights.
        grad_biases: address of the gradients ``[parts, networks, width]`` of each layer's biases.
    """
    last = len(transposed) - 1
    blocks = (job.rows + job.block_rows - 1) // job.block_rows
    for part in range(begin, end):
        for network in range(job.networks):
            place = part * job.networks + network
            for block in range(part * blocks // job.parts, (part + 1) * blocks // job.parts):
                first = block * job.block_rows
                rows = min(job.block_rows, job.rows - first)
                grad = job.scratch + part * job.scratch_bytes
                other = grad + job.scratch_bytes // 2
                width = 4 * widths[last + 1]
                out = job.out + network * job.out_stride + first * job.out_row
                grad_out = job.grad_out + network * job.grad_stride + first * job.grad_row
                for row in range(rows):
                    copy_masked(
                        grad + row * width,
                        grad_out + row * job.grad_row,
                        out + row * job.out_row,
                        grad_biases[last] + place * width,
                        width // VECTOR,
                        NOTHING,
                    )
                for layer in range(last, 0, -1):
                    before = widths[layer]
                    narrow = 4 * before
                    # The outputs are kept for another backward pass: gradients replace a copy of them.
                    outputs = hidden[layer - 1] + (network * job.rows + first) * narrow
                    copy(other, outputs, 0, 0, rows * narrow // VECTOR, NOTHING)
                    target = grad_weights[layer] + place * before * width
                    weight_backward(
                        other, narrow, grad, width, rows, target, width, before, width // VECTOR, 0, 0, 0, 0, 0
                    )
                    weight, sums = transposed[layer] + network * before * width, grad_biases[layer - 1] + place * narrow
                    steps = widths[layer + 1]
                    layer_backward(
                        grad, width, weight, narrow, steps, other, narrow, rows, narrow // VECTOR, sums, 0, 0, 0, 0
                    )
                    grad, other, width = other, grad, narrow
                before = widths[0]
                narrow = 4 * before
                source = job.inputs + reads[network] * job.input_stride + first * job.input_row
                target = grad_weights[0] + place * before * width
                weight_backward(
                    source, job.input_row, grad, width, rows, target, width, before, width // VECTOR, 0, 0, 0, 0, 0
                )
                weight = transposed[0] + network * before * width
                target = job.grad_inputs + (reads[network] * job.rows + first) * narrow
                input_backward(
                    grad, width, weight, narrow, widths[1], target, narrow, rows, narrow // VECTOR, 0, 0, 0, 0, 0
                )


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
        parts = max(1, min(torch.get_num_threads(), -(-rows // BLOCK_ROWS)))
        grad_inputs = padded.new_zeros(padded.shape)
        grad_weights = [padded.new_zeros(parts, *weight.transpose(1, 2).shape) for weight in transposed]
        grad_biases = [padded.new_zeros(parts, networks, width) for width in widths[1:]]
        scratch = padded.new_empty(parts, 2, BLOCK_ROWS * max(widths))
        gradient = _padded(grad_out)
        job = _arguments(padded, out, networks)._replace(
            parts=parts,
            grad_out=gradient.data_ptr(),
            grad_stride=4 * gradient.stride(0),
            grad_row=4 * gradient.stride(1),
            grad_inputs=grad_inputs.data_ptr(),
            scratch=scratch.data_ptr(),
            scratch_bytes=4 * scratch.stride(0),
        )
        arrays = [reads.numpy(), np.array(widths)]
        arrays += [_addresses(tensors) for tensors in (transposed, hidden, grad_weights, grad_biases)]
        each_part(lambda begin, end: backward_parts(begin, end, job, *arrays), parts)
        of_weights = [
            _total(grads)[:, : weight.shape[1], : weight.shape[2]]
            for grads, weight in zip(grad_weights, parameters, strict=True)
        ]
        of_biases = [
            _total(grads)[:, None, : weight.shape[2]] for grads, weight in zip(grad_biases, parameters, strict=True)
        ]
        _, batch, width = ctx.shape
        return grad_inputs[:, :batch, :width], None, *of_weights, *of_biases


def computes(values: Tensor) -> bool:
    """True if the loops compute such values on this machine."""
    return values.dtype == torch.float32 and instructions_for(values.device) is not None


@cache
def compile_loops() -> None:
    """Compile the two loops in this process, or load them from numba's cache; log it if they are compiled."""
    job, none = ExpertArguments(*[0] * len(ExpertArguments._fields))._replace(block_rows=STEPS), np.zeros(1, np.int64)
    calls = ((forward_blocks, (0, 0, job, *[none] * 5)), (backward_parts, (0, 0, job, *[none] * 6)))
    compile_now("experts and towers", calls)


def _arguments(inputs: Tensor, out: Tensor, networks: int) -> ExpertArguments:
    """Return the arguments of the forward pass for padded inputs, and outputs ``[rows, networks, width]``."""
    return ExpertArguments(
        networks=networks,
        rows=inputs.shape[1],
        block_rows=BLOCK_ROWS,
        parts=1,
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


def _total(parts: Tensor) -> Tensor:
    """Add up the gradients of the parts in their order, in place."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
