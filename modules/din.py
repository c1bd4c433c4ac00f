"""Target attention of the Deep Interest Network (Zhou et al., 2018): a small network on ``[q, k, q - k, q * k]``.

Its weights are a softmax over a row's entries. The attention of Moment&Cross is in ``modules/esu.py``.

PyTorch's operations are the definition. On a CPU with AVX-512 or AVX2, the loops of ``modules/din_loops.py`` compute
it in less than half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.blocks import cut_rows, take
from modules.din_kernel import CompiledAttention
from modules.vector_code import instructions_for


class TargetAttention(nn.Module):
    """Weighted sum of a row's entries, with weights ``softmax over entries (w . mlp([q, k, q - k, q * k]))``.

    The score has no bias, which would not change a softmax. The first layer is never applied to the four parts: with
    its weight split into ``W = [A, B, C, D]``, it equals ``q (A + C) + k (B - C + diag(q) D)``, where the matrix on
    ``k`` differs from row to row.

    Args:
        query_dim: width of the queries.
        key_dim: width of the entries; a query of another width goes through a learnt projection.
        hidden: widths of the ReLU layers, at least one.
        compiled: compute by compiled loops where there are some. They round sums in another order.
    """

    def __init__(self, query_dim: int, key_dim: int, hidden: Sequence[int], compiled: bool = False) -> None:
        super().__init__()
        self.compiled = compiled
        self.project = nn.Identity() if query_dim == key_dim else nn.Linear(query_dim, key_dim, bias=False)
        self.first = nn.Linear(4 * key_dim, hidden[0])
        self.rest = nn.ModuleList(nn.Linear(*shape) for shape in pairwise(hidden))
        self.score = nn.Parameter(torch.empty(hidden[-1]).uniform_(-1, 1).div_(math.sqrt(hidden[-1])))

    def forward(self, query: Tensor, keys: Tensor, lengths: Tensor, max_length: int) -> Tensor:
        """Attend to each row's entries.

        Args:
            query: ``[batch, query_dim]``.
            keys: entries of all rows, one row after another, ``[sum of lengths, key_dim]``.
            lengths: number of entries of each row, ``[batch]`` int64, at most ``max_length``.
            max_length: largest possible number of entries of a row.

        Returns:
            ``[batch, key_dim]``; zeros for a row without entries.
        """
        query = self.project(query)
        of_query, of_key, of_difference, of_product = self.first.weight.t().chunk(4)
        bias = torch.addmm(self.first.bias, query, of_query + of_difference)
        # Contiguous copies as [in, out], not views: every block reads them.
        layers = []
        for layer in self.rest:
            layers += [layer.get_parameter("weight").t().contiguous(), layer.get_parameter("bias")]
        of_key, of_product = (of_key - of_difference).contiguous(), of_product.contiguous()
        if self.compiled and instructions_for(keys.device, keys.dtype):
            return CompiledAttention.apply(query, keys, bias, of_key, of_product, self.score, lengths, *layers)
        return PlainAttention.apply(query, keys, bias, of_key, of_product, self.score, lengths, max_length, *layers)

    def attention_weights(self, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """Return the attention weight of each entry, ``[entries, 1]``; the weights of a row sum to 1.

        This is slow and meant for few rows; the arguments are those of :meth:`forward`.
        """
        queries = self.project(query).repeat_interleave(lengths, 0)
        hidden = torch.relu(self.first(torch.cat([queries, keys, queries - keys, queries * keys], 1)))
        for layer in self.rest:
            hidden = torch.relu(layer(hidden))
        scores = torch.mv(hidden, self.score)
        return torch.cat([scores[:0], *(of_row.softmax(0) for of_row in scores.split(lengths.tolist()))])[:, None]


class PlainAttention(torch.autograd.Function):
    """Attention by PyTorch's operations, computed block by block, with its own backward pass.

    On a CPU this takes half the time of the same operations on whole batches, whose activations leave the caches
    between two operations. The activations are kept for the backward pass, ``4 sum(hidden)`` bytes for each entry in
    float32: recomputing the first layer there takes 3 to 10 % longer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        bias: Tensor,
        of_key: Tensor,
        of_product: Tensor,
        score: Tensor,
        lengths: Tensor,
        max_length: int,
        *layers: Tensor,
    ) -> Tensor:
        """Return the weighted sums; ``bias [batch, hidden]`` is the part of the first layer without the keys."""
        width = of_key.shape[1]
        blocks = list(cut_rows(lengths, len(keys), max_length, 2 * of_key.numel(), 2 * width + 2 * len(of_key)))
        out = keys.new_zeros(len(query), keys.shape[1])
        kept = []
        for block in blocks:
            q, k = take(query, block.rows), take(keys, block.entries).view(-1, block.length, keys.shape[1])
            own = torch.addcmul(of_key, q[:, :, None], of_product)
            first = torch.bmm(k, own).add_(take(bias, block.rows)[:, None]).relu_()
            hidden = [first.view(-1, width)]
            for weight, offset in zip(layers[::2], layers[1::2], strict=True):
                hidden.append(torch.addmm(offset, hidden[-1], weight).relu_())
            logits = torch.mv(hidden[-1], score).view(-1, block.length)
            if block.padding is not None:
                logits.masked_fill_(block.padding, torch.finfo(logits.dtype).min)
            share = logits.softmax(1)
            if block.padding is not None:
                # The softmax of a row without entries gives weight to its padding.
                share.masked_fill_(block.padding, 0)
            kept.append((share, hidden))
            out[block.rows] = torch.bmm(share[:, None], k)[:, 0]
        ctx.save_for_backward(query, keys, of_key, of_product, score, *layers)
        ctx.blocks, ctx.kept = blocks, kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments of ``forward``."""
        query, keys, of_key, of_product, score, *layers = ctx.saved_tensors
        dim, width = of_key.shape
        grad_query, grad_bias = torch.zeros_like(query), query.new_zeros(len(query), width)
        # One entry more than there are: the gradients of padding are written there and dropped.
        grad_keys = keys.new_zeros(len(keys) + 1, dim)
        grad_of_key, grad_of_product, grad_score, *grad_layers = (
            torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)
            for t in (of_key, of_product, score, *layers)
        )
        both = torch.cat([of_key, of_product]).t().contiguous()
        for block, (share, hidden) in zip(ctx.blocks, ctx.kept, strict=True):
            q, k = take(query, block.rows), take(keys, block.entries).view(-1, block.length, dim)
            grad = take(grad_out, block.rows)

            grad_share = torch.bmm(k, grad[:, :, None])[..., 0]
            grad_logits = torch.ops.aten._softmax_backward_data(grad_share, share, 1, share.dtype).view(-1)
            grad_score += torch.mv(hidden[-1].t(), grad_logits)
            grad_hidden = torch.outer(grad_logits, score)
            for layer in range(len(layers) // 2, 0, -1):
                grad_hidden = _relu_backward(grad_hidden, hidden[layer])
                grad_layers[2 * layer - 2] += (grad_hidden.t() @ hidden[layer - 1]).t()
                grad_layers[2 * layer - 1] += grad_hidden.sum(0)
                grad_hidden = grad_hidden @ layers[2 * layer - 2].t()
            grad_hidden = _relu_backward(grad_hidden, hidden[0])
            by_row = grad_hidden.view(-1, block.length, width)
            grad_bias[block.rows] = by_row.sum(1)
            grad_own = torch.bmm(k.transpose(1, 2), by_row)
            grad_of_key += grad_own.sum(0)
            grad_of_product += (q[:, :, None] * grad_own).sum(0)
            grad_query[block.rows] = (grad_own * of_product).sum(2)

            through_key, through_product = (grad_hidden @ both).view(-1, block.length, 2, dim).unbind(2)
            full = block.padding is None
            grad_k = grad_keys[block.entries].view_as(k) if full else torch.empty_like(k)
            torch.addcmul(through_key, through_product, q[:, None], out=grad_k)
            grad_k.addcmul_(share[..., None], grad[:, None])
            if not full:
                grad_keys[block.targets(len(keys))] = grad_k.view(-1, dim)
        summed = [gradient.to(query.dtype) for gradient in (grad_of_key, grad_of_product, grad_score, *grad_layers)]
        return grad_query, grad_keys[:-1], grad_bias, *summed[:3], None, None, *summed[3:]


def _relu_backward(grad: Tensor, activation: Tensor) -> Tensor:
    """Turn the gradient of a ReLU's output into that of its input, in place, given the output."""
    return torch.ops.aten.threshold_backward.grad_input(grad, activation, 0, grad_input=grad)
