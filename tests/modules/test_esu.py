"""Multi-head target attention over several sequences against the formula of the papers, written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import modules.blocks
from modules.blocks import cut_rows
from modules.esu import SequenceAttention

PART_DIMS = (3, 2, 4)
MAX_LENGTHS = (7, 5, 6)
KINDS = ("full", "mixed", "short", "none", "unequal")


def make_lengths(kind: str, batch: int) -> list[Tensor]:
    of_kind = {
        "full": lambda longest: torch.full((batch,), longest),
        "mixed": lambda longest: torch.randint(0, longest + 1, (batch,)),
        "short": lambda longest: torch.randint(0, 2, (batch,)),
        "none": lambda longest: torch.zeros(batch, dtype=torch.int64),
    }
    # Unequal: one sequence full, one of many lengths, one without any entry.
    kinds = ("full", "mixed", "none") if kind == "unequal" else (kind,) * len(MAX_LENGTHS)
    return [of_kind[kind](longest) for kind, longest in zip(kinds, MAX_LENGTHS, strict=True)]


def make_sequences(lengths: list[Tensor], dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    return [[torch.randn(int(of_row.sum()), dim, dtype=dtype) for dim in PART_DIMS] for of_row in lengths]


ALIKE = ((2, 1), (0, 4), (2, 0))


def make_attention(query_dim: int = 5, cross_parts: int = 0) -> SequenceAttention:
    item_dim = sum(PART_DIMS[: len(PART_DIMS) - cross_parts])
    attention = SequenceAttention(
        query_dim,
        PART_DIMS,
        MAX_LENGTHS,
        heads=3,
        head_dim=4,
        cross_parts=cross_parts,
        alike=[pair for pair in ALIKE if pair[1] < item_dim],
    )
    # What starts at zero, or at one, would hide mistakes.
    for parameter in (attention.place, attention.cross, attention.alike):
        if parameter is not None:
            torch.nn.init.normal_(parameter)
    return attention


def looped(attention: SequenceAttention, query: Tensor, sequences: list[list[Tensor]], lengths: list[Tensor]) -> Tensor:
    """Compute projections, scores, softmax, weighted sum and mass for each row, sequence and head in loops.

    The mass is ``log(1 + sum of exp(score))``.
    """
    heads, head_dim = attention.heads, attention.value.shape[3]
    item_dim = attention.key.shape[3]
    rows: list[list[Tensor]] = [[] for _ in query]
    for s, (sequence, of_row) in enumerate(zip(sequences, lengths, strict=True)):
        entries, first = torch.cat(sequence, 1), 0
        for b, length in enumerate(of_row.tolist()):
            own = entries[first : first + length]
            first += length
            projected = (query[b] @ attention.query[s]).view(heads, head_dim)
            for h in range(heads):
                scores: list[Tensor] = []
                for number, entry in enumerate(own):
                    key = attention.key[s, h] @ entry[:item_dim]
                    score = (projected[h] * key).sum() / math.sqrt(head_dim)
                    if attention.alike is not None:
                        pairs = [pair for pair in ALIKE if pair[1] < item_dim]
                        for weight, (asked, given) in zip(attention.alike[s, h], pairs, strict=True):
                            score = score + weight * query[b, asked] * entry[given]
                    if attention.cross is not None:
                        score = score + (attention.cross[s, h] * entry[item_dim:]).sum()
                    scores.append(score + attention.place[s, h, attention.place.shape[2] - length + number])
                if not scores:
                    rows[b].append(query.new_zeros(head_dim + 1))
                    continue
                values = own @ attention.value[s, h]
                rows[b].append(functional.softmax(torch.stack(scores), 0) @ values)
                rows[b].append(torch.log1p(torch.stack(scores).exp().sum())[None])
    return torch.stack([torch.cat(parts) for parts in rows])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cross_parts", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_values", [1, 300, 1 << 20])
def test_attention_and_gradients_equal_the_loop(
    block_values: int, kind: str, cross_parts: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.blocks, "BLOCK_VALUES", block_values)
    torch.manual_seed(seed)
    batch = 6
    attention = make_attention(cross_parts=cross_parts).double()
    lengths = make_lengths(kind, batch)
    sequences, query = make_sequences(lengths), torch.randn(batch, 5, dtype=torch.float64)
    upstream = torch.randn(batch, 3 * attention.out_features, dtype=torch.float64)
    results = []
    for function in (attention, lambda *inputs: looped(attention, *inputs)):
        leaves = [query.clone().requires_grad_()]
        leaves += [part.clone().requires_grad_() for sequence in sequences for part in sequence]
        width = len(PART_DIMS)
        given = [leaves[1 + width * s : 1 + width * (s + 1)] for s in range(len(sequences))]
        out = function(leaves[0], given, lengths)
        wanted = [*leaves, *attention.parameters()]
        gradients = [torch.zeros_like(leaf) for leaf in wanted]
        if out.requires_grad:
            found = torch.autograd.grad((out * upstream).sum(), wanted, allow_unused=True)
            gradients = [z if g is None else g for z, g in zip(gradients, found, strict=True)]
        results.append((out.detach(), gradients))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cross_parts", [0, 1])
@pytest.mark.parametrize("kind", ["full", "unequal"])
def test_gradients_are_those_of_finite_differences(kind: str, cross_parts: int) -> None:
    torch.manual_seed(4)
    attention = make_attention(3, cross_parts).double()
    lengths = make_lengths(kind, 3)
    leaves = [torch.randn(3, 3, dtype=torch.float64), *(part for seq in make_sequences(lengths) for part in seq)]
    leaves += [parameter.detach() for parameter in attention.parameters()]
    names = [name for name, _ in attention.named_parameters()]
    for leaf in leaves:
        leaf.requires_grad_()

    def run(query: Tensor, *rest: Tensor) -> Tensor:
        sequences = [rest[3 * s : 3 * s + 3] for s in range(3)]
        return torch.func.functional_call(
            attention, dict(zip(names, rest[9:], strict=True)), (query, sequences, lengths)
        )

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_weights_are_the_weights_of_the_sum(kind: str) -> None:
    torch.manual_seed(5)
    attention = make_attention(cross_parts=1).double()
    lengths = make_lengths(kind, 6)
    sequences, query = make_sequences(lengths), torch.randn(6, 5, dtype=torch.float64)
    parts = []
    shares = attention.attention_weights(query, sequences, lengths)
    for s, (share, of_row) in enumerate(zip(shares, lengths, strict=True)):
        assert share.shape == (int(of_row.sum()), 3)
        entries = torch.cat(sequences[s], 1)
        row = torch.repeat_interleave(of_row)
        for h in range(3):
            summed = torch.zeros(6, sum(PART_DIMS), dtype=torch.float64).index_add(0, row, share[:, h, None] * entries)
            parts.append(summed @ attention.value[s, h])
    sums = attention(query, sequences, lengths).view(6, len(MAX_LENGTHS) * 3, -1)[:, :, :-1]
    torch.testing.assert_close(torch.cat(parts, 1), sums.flatten(1))


def test_the_mass_of_a_head_grows_with_number_and_fit_of_entries() -> None:
    attention = SequenceAttention(1, (1,), (20,), heads=1, head_dim=1, alike=[(0, 0)])
    with torch.no_grad():
        attention.query.zero_()
    lengths = torch.tensor([0, 1, 1, 20, 20])
    entries = torch.cat([torch.tensor([2.0, -2.0]), torch.full((20,), 2.0), torch.full((20,), -2.0)])[:, None]
    found = attention(torch.ones(5, 1), [[entries]], [lengths])[:, 1]
    expected = torch.log1p(torch.tensor([0, 1, 1, 20, 20]) * torch.tensor([0.0, 2, -2, 2, -2]).exp())
    torch.testing.assert_close(found, expected)


def test_attention_starts_with_entries_similar_to_the_candidate() -> None:
    """Before training, entries with the candidate's own vector get the largest weights."""
    torch.manual_seed(0)
    attention = SequenceAttention(8, (8,), (4,), heads=2, alike=[(column, column) for column in range(8)])
    vectors = 3 * functional.normalize(torch.randn(4, 8), dim=1)
    (shares,) = attention.attention_weights(vectors, [[vectors.repeat(4, 1)]], [torch.full((4,), 4)])
    assert shares.mean(1).view(4, 4).argmax(1).tolist() == [0, 1, 2, 3]


def test_float32_agrees_with_float64() -> None:
    torch.manual_seed(0)
    attention = SequenceAttention(40, (16, 16, 32), (50, 20))
    lengths = [torch.randint(0, longest + 1, (200,)) for longest in (50, 20)]
    sequences = [[torch.randn(int(n.sum()), dim) for dim in (16, 16, 32)] for n in lengths]
    query = torch.randn(200, 40)
    single = attention(query, sequences, lengths)
    double = attention.double()(query.double(), sequences, lengths)
    torch.testing.assert_close(single, double.float(), rtol=1e-5, atol=1e-6)


def test_bfloat16_parameters_read_float32_entries_and_give_them_float32_gradients() -> None:
    torch.manual_seed(0)
    attention = make_attention()
    lengths = make_lengths("mixed", 50)
    sequences, query = make_sequences(lengths, torch.float32), torch.randn(50, 5)
    expected = attention(query, sequences, lengths)
    for sequence in sequences:
        for part in sequence:
            part.requires_grad_()
    out = attention.bfloat16()(query.bfloat16(), sequences, lengths)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)
    for sequence in sequences:
        for part in sequence:
            assert part.grad is not None and part.grad.dtype == torch.float32 and part.grad.any()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16, name


def test_cross_features_score_the_same_whatever_the_candidate() -> None:
    torch.manual_seed(0)
    attention = make_attention(cross_parts=1)
    with torch.no_grad():
        attention.query.zero_()
        attention.place.zero_()
        attention.alike.zero_()
    lengths = make_lengths("full", 4)
    sequences = make_sequences(lengths, torch.float32)
    found, others = (
        attention(torch.randn(2, 4, 5)[0], sequences, lengths),
        attention(torch.randn(4, 5), sequences, lengths),
    )
    torch.testing.assert_close(found, others)
    assert attention.cross is not None
    expected = (sequences[0][2][:7] @ attention.cross[0].t()).softmax(0)
    torch.testing.assert_close(attention.attention_weights(torch.randn(4, 5), sequences, lengths)[0][:7], expected)


def test_places_count_from_the_end_of_each_row() -> None:
    attention = make_attention()
    with torch.no_grad():
        attention.query.zero_()
        attention.alike.zero_()
        attention.place.zero_()
        attention.place[:, :, -1] = 50.0
    lengths = [torch.tensor([2, 0, 5]), torch.tensor([5, 1, 0]), torch.tensor([0, 0, 6])]
    sequences = make_sequences(lengths, torch.float32)
    newest = [[1, 6], [4, 5], [5]]
    for share, entries in zip(attention.attention_weights(torch.zeros(3, 5), sequences, lengths), newest, strict=True):
        assert share.min(1).values.gt(0.99).nonzero().flatten().tolist() == entries


def test_a_batch_of_no_rows_gives_every_parameter_a_gradient_of_zeros() -> None:
    attention = make_attention(cross_parts=1)
    lengths = [torch.zeros(0, dtype=torch.int64)] * 3
    out = attention(torch.zeros(0, 5), make_sequences(lengths, torch.float32), lengths)
    assert out.shape == (0, 3 * attention.out_features)
    out.sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("cross_parts", [-1, 3])
def test_a_split_that_leaves_nothing_for_the_product_is_refused(cross_parts: int) -> None:
    with pytest.raises(ValueError, match="cannot be cross features"):
        SequenceAttention(5, PART_DIMS, MAX_LENGTHS, cross_parts=cross_parts)


@pytest.mark.parametrize("alike", [[(0, 1), (1, 1)], [(0, 3)]])
def test_columns_that_cannot_be_compared_are_refused(alike: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        SequenceAttention(5, PART_DIMS, MAX_LENGTHS, cross_parts=2, alike=alike)


@pytest.mark.parametrize("longest", [20, 100])
def test_blocks_hold_every_entry_once_and_little_padding(longest: int) -> None:
    torch.manual_seed(1)
    lengths = torch.randint(0, longest + 1, (4096,))
    entries = int(lengths.sum())
    blocks = list(cut_rows(lengths, entries, longest, 512, 136))
    own, places = [], 0
    for block in blocks:
        assert isinstance(block.entries, Tensor) and block.padding is not None
        own.append(block.entries[~block.padding.flatten()])
        places += block.padding.numel()
    assert torch.equal(torch.cat(own).sort().values, torch.arange(entries))
    assert len(blocks) > 3
    assert places < 1.06 * entries


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("block_values", [1, 10_000, 1 << 20])
def test_blocks_are_as_large_as_they_may_be(block_values: int, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules.blocks, "BLOCK_VALUES", block_values)
    torch.manual_seed(1)
    longest, row_values, entry_values = 30, 64, 17
    lengths = torch.full((2048,), longest) if full else torch.randint(0, longest + 1, (2048,))
    blocks = list(cut_rows(lengths, int(lengths.sum()), longest, row_values, entry_values))
    for block in blocks:
        rows = block.rows.stop - block.rows.start if isinstance(block.rows, slice) else len(block.rows)
        most = max(1, block_values // (row_values + block.length * entry_values))
        # Rows that are shorter end a block that is a quarter full.
        least = 1 if block is blocks[-1] else most if full else most // 4
        assert least <= rows <= most


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_agrees_with_the_cpu(kind: str) -> None:
    torch.manual_seed(0)
    attention = make_attention(cross_parts=1).double()
    lengths = make_lengths(kind, 30)
    sequences, query = make_sequences(lengths), torch.randn(30, 5, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        attention.zero_grad()
        attention.to(device)
        given = [[part.to(device).requires_grad_() for part in sequence] for sequence in sequences]
        out = attention(query.to(device), given, [of_row.to(device) for of_row in lengths])
        out.square().sum().backward()
        results.append([out, *(part.grad for seq in given for part in seq), *(p.grad for p in attention.parameters())])
    for mine, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine.cpu(), reference.cpu())


def test_an_entry_of_one_column_without_comparisons_is_accepted() -> None:
    attention = SequenceAttention(3, [1], [4])
    assert attention.alike is None and attention.key.shape[2:] == (16, 1)
