"""The ways of training that must agree with plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Combination:
    optimizer: str
    sharding: str
    stage: int
    parts: int = 1
    clipping: float = 0.0
    overlap: bool = True
    torchrec_path: bool = False
    bf16: bool = False

    def __str__(self) -> str:
        words = [self.optimizer, self.sharding, f"ZeRO {self.stage}", f"{self.parts} parts"]
        words += [f"clipping {self.clipping}"] if self.clipping else []
        words += [word for word in ("torchrec_path", "bf16") if getattr(self, word)]
        return ", ".join(words if self.overlap else [*words, "no overlap"])


SHARDED = [
    ("sgd", "table_wise"),
    ("sgd", "row_wise"),
    ("rowwise_adagrad", "table_wise"),
    ("rowwise_adagrad", "row_wise"),
]
STEP = [(1, 0.0), (1, 0.5), (3, 0.0), (3, 0.5)]
COMBINATIONS = [
    *(
        Combination(optimizer, sharding, stage, parts, clipping)
        for (optimizer, sharding), stage, (parts, clipping) in product(SHARDED, (0, 1, 2), STEP)
    ),
    *(
        Combination("sgd", "column_wise", stage, parts, clipping)
        for stage, (parts, clipping) in product((0, 2), STEP[::3])
    ),
    *(Combination("adagrad", sharding, 1, 3, 0.5) for sharding in ("table_wise", "row_wise", "column_wise")),
    *(Combination("rowwise_adagrad", "auto", stage, 1, 0.5) for stage in (0, 1)),
    *(Combination(optimizer, sharding, 1, 3, 0.5, torchrec_path=True) for optimizer, sharding in SHARDED),
    *(Combination(optimizer, sharding, 1, 3, 0.5, overlap=False) for optimizer, sharding in SHARDED),
]
