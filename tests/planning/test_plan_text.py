"""A plan as text and as a picture: every part of the JSON is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from trainer.planning.plan_text import draw_plan, format_plan

CLUSTER: dict[str, Any] = {"name": "h200", "gpus": 8, "hosts": 1, "accelerator": {"memory_gb": 141.0}}
RANKER: dict[str, Any] = {
    "kind": "train",
    "cluster": CLUSTER,
    "rows_per_rank": 128,
    "tables": [
        {
            "table": "item",
            "rows": 1000,
            "dim": 16,
            "sharding": "row_wise",
            "kernel": "fused",
            "ranks": [0, 1],
            "shards": [[500, 16], [500, 16]],
            "ids_per_step": 300.0,
            "distinct_ids_per_step": 250.4,
            "share_of_busiest_rank": 0.625,
        }
    ],
    "memory": {
        "capacity": 141 * 10**9,
        "fullest_rank": 3,
        "fullest": {"tables": 32_000, "activations": 2_000_000},
        "fullest_total": 2_032_000,
        "emptiest_rank": 7,
        "emptiest_total": 2_000_000,
    },
    "host_memory": {"capacity": 256 * 10**9, "parts": {"checkpoint snapshot": 5_000}, "total": 5_000},
    "step": {
        "seconds": 0.004,
        "parts": {"dense": 0.003, "rows": 0.001},
        "bottleneck": "dense",
        "rows_per_second": 256_000.0,
        "busiest_rank": 2,
        "loader_cores_per_host": 6,
    },
    "assumptions": {"fill": 1.0},
    "faster": [{"change": "features.item.sharding = 'row_wise'", "seconds": 0.002, "bottleneck": "rows"}],
    "problems": ["rank 3 needs more"],
    "remedies": [{"change": "--hosts 2 --gpus 16", "fits": True, "needs": 10**9, "has": 2 * 10**9}],
}
LANGUAGE_MODEL: dict[str, Any] = {
    "kind": "finetune",
    "cluster": CLUSTER,
    "model": {"path": "Qwen/Qwen2-7B", "parameters": 7_000, "trained": 70},
    "zero": {
        "stage": 2,
        "bf16": True,
        "offload_optimizer": True,
        "offload_parameters": False,
        "gradient_checkpointing": True,
    },
    "rows_per_micro_batch": 2,
    "largest_rows_per_micro_batch": 15,
    "largest_batch_size": 1_200,
    "memory": {"capacity": 80 * 10**9, "fullest": {"weights": 14_000}, "fullest_total": 14_000},
    "host_memory": {"capacity": 256 * 10**9, "parts": {"offloaded": 840}, "total": 840},
    "step": {
        "seconds": 0.5,
        "parts": {"compute": 0.4, "network": 0.1},
        "bottleneck": "compute",
        "tokens_per_second": 73_074.0,
    },
    "assumptions": {"mfu": 0.4},
    "problems": [],
    "remedies": [],
}


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            RANKER,
            (
                "8 x h200, 141 GB each",
                "item   row_wise  fused   2 ranks",
                "500 x 16",
                "memory of rank 3, the fullest",
                "rank 7, the emptiest",
                "dense           3.00   75 %",
                "256,000 rows/s with 128 rows a rank",
                "limited by dense (rank 2)",
                "6 cores",
                "features.item.sharding = 'row_wise': 2.0 ms a step, then limited by rows",
                "does not fit:\n  rank 3 needs more",
                "--hosts 2 --gpus 16  yes   1.0 GB  2.0 GB",
            ),
        ),
        (
            LANGUAGE_MODEL,
            (
                "Qwen/Qwen2-7B: 7,000 weights, 70 of them trained",
                "ZeRO stage 2, bf16, offload: offload_optimizer, gradient checkpointing: on",
                "2 sequences a rank; 15 would fit (train.batch_size = 1,200)",
                "host: offloaded",
                "73,074 tokens/s; limited by compute",
            ),
        ),
    ],
)
def test_a_plan_as_text_has_its_figures(plan: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    text = format_plan(plan)
    for word in words:
        assert word in text, text
    assert max(map(len, text.splitlines())) <= 160
    for name in ("first.svg", "second.svg"):
        draw_plan(plan, tmp_path / name)
    picture = (tmp_path / "first.svg").read_text()
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    for part in (*plan["memory"]["fullest"], *plan["step"]["parts"]):
        assert part in picture
