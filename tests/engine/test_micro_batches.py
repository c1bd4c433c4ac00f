"""The micro-batches of a batch together equal the batch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.content import BatchVectors
from trainer.data.loading.batch import RankingBatch
from trainer.engine.micro_batches import MicroBatch, split_micro_batches


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), max_size=9),
    parts=st.integers(1, 5),
    fixed=st.integers(1, 3),
)
def test_parts_follow_each_other(lengths: list[int], parts: int, fixed: int) -> None:
    rows = len(lengths)
    keyed = KeyedJaggedTensor(
        keys=["seen", "side"],
        values=torch.arange(sum(lengths) + rows * fixed),
        lengths=torch.tensor([*lengths, *[fixed] * rows], dtype=torch.int64),
        stride=rows,
        length_per_key=[sum(lengths), rows * fixed],
    )
    embedded = {"seen": torch.randn(sum(lengths), 2), "side": torch.randn(rows * fixed, 3)}
    dense, label, mask = torch.randn(rows, 2), torch.randn(rows, 3), torch.randn(rows, 3)
    index = torch.arange(rows)
    slow = torch.rand(rows) < 0.5
    places = {"topic": torch.randint(-1, 4, (rows,)), "seen_topic": torch.randint(-1, 4, (sum(lengths),))}
    content = {"topic": BatchVectors(torch.randn(4, 2), places, {"seen_topic": "seen"})}
    batch = RankingBatch([keyed], dense, label, mask, index, index, index, rows, slow=slow, content=content)

    cut = split_micro_batches(batch, embedded, {"seen": None, "side": fixed}, parts)

    sizes = [len(part.dense) for part in cut]
    assert len(cut) == parts and max(sizes) - min(sizes) <= 1
    for name in embedded:
        assert torch.equal(torch.cat([part.embedded[name] for part in cut]), embedded[name])
    for name, whole in (("dense", dense), ("label", label), ("mask", mask), ("slow", slow)):
        assert torch.equal(torch.cat([getattr(part, name) for part in cut]), whole)
    assert all(part.lengths.keys() == {"seen"} for part in cut)
    assert torch.cat([part.lengths["seen"] for part in cut]).tolist() == lengths
    for name, of_lookup in places.items():
        # A vector of zeros stands for the ids without one.
        values = [torch.cat([torch.zeros(1, 2), of.vectors])[of.places[name] + 1] for of in _of(cut, "topic")]
        assert torch.equal(torch.cat(values), torch.cat([torch.zeros(1, 2), content["topic"].vectors])[of_lookup + 1])
    for part in cut:
        assert part.inputs == (part.embedded, part.lengths, part.dense, part.content)
        assert len(part.embedded["seen"]) == int(part.lengths["seen"].sum())
        assert len(part.embedded["side"]) == fixed * len(part.dense)


def _of(cut: list[MicroBatch], table: str) -> list[BatchVectors]:
    return [part.content[table] for part in cut]


def test_gradients_of_unused_lookups_are_zero() -> None:
    index = torch.arange(2)
    keyed = KeyedJaggedTensor(keys=["user"], values=index, lengths=torch.ones(2, dtype=torch.int64), stride=2)
    batch = RankingBatch([keyed], *[torch.zeros(2, 1)] * 3, index, index, index, 2)
    (part,) = split_micro_batches(batch, {"user": torch.ones(2, 3)}, {"user": 1}, 1)
    assert part.slow is None and part.inputs == (part.embedded, part.lengths, part.dense)
    part.embedded["user"].requires_grad_()
    assert torch.equal(part.gradient("user"), torch.zeros(2, 3))
    (part.embedded["user"] * 5).sum().backward()
    assert torch.equal(part.gradient("user"), torch.full((2, 3), 5.0))
