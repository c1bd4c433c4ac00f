"""Variants of training that must agree with plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Combination:
    """Settings of one variant: ``sharding`` of all tables, or ``mixed``; ``parts`` is the number of micro-batches.

    ``network`` is ``small`` or a kind of :class:`modules.ranker.Ranker`.
    """

    optimizer: Any
    sharding: str
    stage: int
    parts: int = 1
    clipping: float = 0.0
    overlap: bool = True
    torchrec_path: bool = False
    deduplicate: bool = True
    bf16: bool = False
    accumulate_in: str = ""
    network: str = "small"

    def __str__(self) -> str:
        words = [self.optimizer, self.sharding, f"ZeRO {self.stage}", f"{self.parts} parts"]
        words += [f"clipping {self.clipping}"] if self.clipping else []
        words += [word for word in ("torchrec_path", "bf16") if getattr(self, word)]
        words += [] if self.deduplicate else ["ids as they come"]
        words += [f"accumulated in {self.accumulate_in}"] if self.accumulate_in else []
        words += [self.network] if self.network != "small" else []
        return ", ".join(words if self.overlap else [*words, "no overlap"])


SHARDED = [
    Combination(optimizer, sharding, 1, parts=3, clipping=0.5)
    for optimizer, sharding in product(("sgd", "rowwise_adagrad"), ("table_wise", "row_wise"))
]
STAGES = (0, 1, 2)
STEP = [{"parts": parts, "clipping": clipping} for parts, clipping in product((1, 3), (0.0, 0.5))]

PRODUCT = [replace(combination, stage=stage, **step) for combination, stage, step in product(SHARDED, STAGES, STEP)]


def _even(combination: Combination) -> bool:
    """True for half of the product, in which every combination of any four of the five settings occurs."""
    settings = combination.optimizer == "sgd", combination.sharding == "row_wise", combination.parts == 3
    return (sum(settings) + bool(combination.clipping) + combination.stage) % 2 == 0


HALF_PRODUCT = [combination for combination in PRODUCT if _even(combination) or combination in SHARDED]
REST = [combination for combination in PRODUCT if combination not in HALF_PRODUCT]
"""Combinations of the slow tests alone."""

FLOAT32 = [
    *HALF_PRODUCT,
    *(Combination("sgd", "column_wise", stage, **step) for stage, step in product(STAGES, STEP[::3])),
    *(Combination("adagrad", sharding, 1, **STEP[3]) for sharding in ("table_wise", "row_wise", "column_wise")),
    *(Combination("rowwise_adagrad", sharding, 1, **STEP[3]) for sharding in ("auto", "mixed")),
    # TorchRec's own exchange; by default a CPU uses it for column-wise tables only.
    *(replace(combination, torchrec_path=True) for combination in SHARDED),
    *(replace(combination, deduplicate=False) for combination in SHARDED),
]
DCN = [Combination("rowwise_adagrad", "row_wise", 2, **step, network="dcn") for step in (STEP[0], STEP[3])]
NO_OVERLAP = [
    replace(combination, overlap=False) for combination in (*SHARDED, Combination("sgd", "column_wise", 0, **STEP[3]))
]
BFLOAT16 = [
    Combination("rowwise_adagrad", "row_wise", 1, **STEP[3], bf16=True),
    Combination("rowwise_adagrad", "row_wise", 1, **STEP[3], bf16=True, accumulate_in="fp32"),
    Combination("sgd", "table_wise", 2, **STEP[3], bf16=True),
]
CHECKPOINTED = [
    Combination("rowwise_adagrad", "table_wise", 0, **STEP[3]),
    Combination("rowwise_adagrad", "row_wise", 1, **STEP[3]),
    Combination("adagrad", "column_wise", 2, **STEP[3]),
    Combination("sgd", "row_wise", 2, **STEP[3]),
    *BFLOAT16[1:],
]


def resharded(saved: Combination) -> Combination:
    """Return another layout and, in float32, another ZeRO stage, to load a checkpoint into."""
    sharding = {"table_wise": "row_wise", "row_wise": "table_wise", "column_wise": "row_wise"}[saved.sharding]
    stage = saved.stage % 2 + 1 if saved.bf16 else (saved.stage + 1) % 3
    return replace(saved, sharding=sharding, stage=stage, accumulate_in="")
