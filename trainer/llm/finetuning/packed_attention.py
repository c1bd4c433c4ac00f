"""Attention of packed sequences: the inputs of each implementation, and the pairs of tokens that it computes.

A dense mask of a packed sequence makes attention compute all pairs of its tokens, although only those inside a sample
count. On a GPU flex attention skips the blocks of pairs between samples, and flash attention takes each sample as a
sequence of its own. PyTorch has neither with a backward pass on a CPU, which keeps the dense mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.config.finetune import AttentionKind
from trainer.llm.finetuning.packed_batch import TokenBatch
from trainer.llm.finetuning.packing import Packs
from trainer.llm.models.ready_mask import ready_mask

IMPLEMENTATIONS: dict[AttentionKind, str] = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
    "flash": "flash_attention_2",
}
"""Name of each kind in transformers."""

BLOCK = 128
"""Tokens of an edge of a block of flex attention; PyTorch's default."""

_COUNTED = 1024
"""Sequences of a job on which pairs are counted."""

_RECOMPILATIONS = 64
"""Compiled forms of flex attention: training and evaluation, by the number of rows and blocks. Beyond PyTorch's limit
of 8 it would compute all pairs in float32."""


class Pairs(NamedTuple):
    """Numbers of pairs of a query and a key, for one head of one layer.

    Attributes:
        needed: pairs inside a sample, of a token with itself and with earlier ones.
        computed: pairs that the implementation computes.
    """

    needed: int
    computed: int


def describe_attention(kind: AttentionKind, packs: Packs, lengths: Any) -> str:
    """Return the line that states the attention of a run.

    Args:
        kind: the attention.
        packs: sequences of the job; the first ones are counted.
        lengths: ``[samples]`` tokens of each sample.
    """
    rows = [lengths[samples].tolist() for samples in packs[:_COUNTED]]
    needed, computed = count_pairs(rows, kind)
    how = {
        "sdpa": "a dense mask",
        "eager": "a dense mask",
        "flex": f"masks of {BLOCK} x {BLOCK} tokens",
        "flash": "each sample as a sequence",
    }[kind]
    packed = any(len(row) > 1 for row in rows)
    return (
        f"attention {kind}: {how if packed else 'one sample in a sequence'}; {computed / max(needed, 1):.1f} times the "
        f"pairs of tokens that count, in the first {len(rows):,} sequences"
    )


def row_multiple(implementation: str) -> int:
    """Return the number of tokens of which row lengths are a multiple; the argument is transformers' name."""
    # Whole blocks need no checks of their edges, and few row lengths few compiled forms.
    return BLOCK if implementation == IMPLEMENTATIONS["flex"] else 8


def attention_inputs(batch: TokenBatch, config: Any) -> dict[str, Any]:
    """Return what a model of transformers needs to keep the samples of a batch apart, as arguments by name.

    Args:
        batch: the sequences.
        config: the model's configuration of transformers; its attention is one of :data:`IMPLEMENTATIONS`.
    """
    implementation = config._attn_implementation
    if implementation == IMPLEMENTATIONS["flex"]:
        return {"attention_mask": block_mask(batch.segments)}
    if implementation == IMPLEMENTATIONS["flash"]:
        # Given once for all layers: from the positions every layer would derive them again, and wait for the device.
        starts, longest = batch.run_starts, batch.longest_run
        return {
            "attention_mask": ready_mask(config, None),
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    mask = batch.mask
    if implementation == IMPLEMENTATIONS["eager"]:
        if mask is not None:
            # transformers adds this mask to the scores; a mask of bools would only add 1 to those that count.
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
        return {"attention_mask": mask}
    return {"attention_mask": ready_mask(config, None) if mask is None else mask}


def block_mask(segments: Tensor) -> Any:
    """Return the block mask of flex attention that is causal inside each sample.

    Args:
        segments: ``[rows, length]`` int64, see :class:`TokenBatch`.
    """
    import torch._dynamo.config as dynamo
    from torch.nn.attention.flex_attention import create_block_mask

    dynamo.recompile_limit = max(dynamo.recompile_limit, _RECOMPILATIONS)

    def within_sample(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segments[row, query] == segments[row, key])

    rows, length = segments.shape
    return create_block_mask(within_sample, rows, None, length, length, device=segments.device, BLOCK_SIZE=BLOCK)


def count_pairs(rows: Sequence[Sequence[int]], kind: AttentionKind) -> Pairs:
    """Count the pairs of tokens that count in a batch, and those that an implementation computes.

    Of ``flash`` its tiles at the edges of samples are not counted, and of ``sdpa`` without packing those on the
    diagonal.

    Args:
        rows: tokens of the samples of each row.
        kind: the attention.
    """
    multiple = row_multiple(IMPLEMENTATIONS[kind])
    width = -(-max([1, *map(sum, rows)]) // multiple) * multiple
    needed = sum(_causal(tokens) for row in rows for tokens in row)
    if kind == "flash":
        return Pairs(needed, needed + sum(_causal(width - sum(row)) for row in rows))
    if kind == "flex":
        return Pairs(needed, sum(BLOCK**2 * _blocks(row, width) for row in rows))
    masked = kind == "eager" or any(len(row) > 1 for row in rows)
    return Pairs(needed, len(rows) * (width**2 if masked else _causal(width)))


def _causal(tokens: int) -> int:
    """Return the number of pairs of a token with itself and with earlier ones."""
    return tokens * (tokens + 1) // 2


def _blocks(row: Sequence[int], width: int) -> int:
    """Return the number of blocks of a row in which a pair counts; ``width`` is a multiple of :data:`BLOCK`."""
    starts = list(accumulate(row, initial=0))
    # Padding is a run of its own.
    runs = list(pairwise(starts if starts[-1] == width else [*starts, width]))
    seen, run = 0, 0
    for first in range(0, width, BLOCK):
        # The earliest key of a block of queries is the first token of the run of its first query.
        while runs[run][1] <= first:
            run += 1
        seen += first // BLOCK - runs[run][0] // BLOCK + 1
    return seen
