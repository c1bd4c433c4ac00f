"""Compile the admission of dynamic ids ahead of time, for GPUs that this machine need not have; prints JSON lines."""

from __future__ import annotations

import json

from tests.modules.search.triton_compilation import CAPABILITIES, compiled
from trainer.sparse import admission_kernel


def main() -> None:
    """Compile each policy."""
    columns = ("id", "seen", "sightings")
    arguments = {
        **{"ids": "*i64", "buckets": "*i64", "stop_of": "*i64"},
        **dict.fromkeys(("total", "rows", "first_row", "step", "admit_after"), "i32"),
        **{f"{of}_{name}": "*i64" if name == "id" else "*i32" for of in ("served", "candidate") for name in columns},
        **{"row_of": "*i64", "evicted_of": "*i64"},
    }
    for capability in CAPABILITIES:
        for policy in admission_kernel.POLICIES.values():
            blocks = {"POLICY": policy, "WIDTH": 64, "BLOCK": 64}
            print(json.dumps(compiled(admission_kernel._admit, arguments, blocks, capability, warps=1)))


if __name__ == "__main__":
    main()
