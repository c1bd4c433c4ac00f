"""Versions and machine of a run."""

from __future__ import annotations

import pytest

from modules import vector_code
from trainer.runtime import environment


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("instructions", ["AVX-512", "AVX2", None])
def test_each_family_of_loops_has_its_form(
    instructions: str | None, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_code, "INSTRUCTIONS", instructions)
    monkeypatch.setattr(environment, "PAIRS", pairs)
    found = environment.computed_on_this_cpu()
    form = instructions or "no AVX2"
    own = f"compiled loops ({instructions})" if instructions else "PyTorch's operations"
    assert found == {
        "attention": own,
        "experts and towers": own,
        "rows of tables": "compiled loops (vectors of four values)",
        "searches of histories": f"compiled loops ({form})",
        "codebooks": f"compiled loops ({form}{', pairs of bfloat16 values' if pairs else ''})",
    }
