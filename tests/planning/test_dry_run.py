"""A step of 64 ranks on a fake process group: collectives and bytes of one rank, beside the plan."""

from __future__ import annotations

import json

import pytest

from tests.conftest import RunRanks
from tests.paths import ROOT


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_a_rank_of_64_sends_what_the_plan_says(run_ranks: RunRanks, sharding: str) -> None:
    found = json.loads(run_ranks("tests.planning.dry_run", 64, sharding, ranks=1).splitlines()[-1])
    assert {len(table["ranks"]) for table in found["plan"]} == ({64} if sharding == "row_wise" else {1})
    # Numbers of ids, ids, rows, gradients; nothing else goes from rank to rank but sums over the ranks.
    assert found["all_to_all"] == 4
    assert found["numbers"][0] == found["numbers"][1]
    for counted in ("ids_out", "rows_out", "gradients_out"):
        assert found[counted][0] == pytest.approx(found[counted][1], rel=0.03), counted
    gradients = [size for name, size in found["collectives"] if name == "allreduce_" and size > 100]
    assert gradients == [4 * found["parameters"]]
    # docs/scaling.md has these numbers: first the two columns of row-wise tables, then those of table-wise ones.
    of_page = {
        "all-to-all, numbers of ids": found["numbers"],
        "all-to-all, ids": found["ids_out"],
        "all-to-all, rows": found["rows_out"],
        "all-to-all, gradients": found["gradients_out"],
        "all-reduce, network's gradients (elements x 4)": [*gradients, 4 * found["parameters"]],
    }
    for name, numbers in of_page.items():
        (line,) = (
            line for line in (ROOT / "docs/scaling.md").read_text().splitlines() if line.startswith(f"| {name} |")
        )
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        of_sharding = cells[:2] if sharding == "row_wise" else cells[2:]
        assert of_sharding == [f"{number:,.0f}" for number in numbers], name
