"""Mistakes in `[init_from]` that are found before anything is fitted.

tests/distributed/test_init_from.py tests the copied tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.stored_checkpoint import write_checkpoint
from trainer.config.ranker import JobConfig, parse_config
from trainer.console.errors import UserError
from trainer.data.features.content_tables import TableFacts
from trainer.data.features.fit import FittedFeatures
from trainer.ranking.warm_start import check_source, network_meaning


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run with a user table of dimension 16 and a room table of dimension 8."""
    write_checkpoint(tmp_path / "run", {"user": torch.ones(5, 16), "room": torch.ones(4, 8)}, {}, {})
    return tmp_path / "run"


def config_of(run: Path | str, tables: tuple[str, ...] = (), **features: Any) -> JobConfig:
    init_from = {"run": str(run), "tables": tables}
    return parse_config({"data": {"path": "d"}, "features": features, "init_from": init_from}, "test")


def test_what_fits_passes(run: Path) -> None:
    check_source(config_of(run))
    check_source(config_of(run, ("user",)))
    check_source(config_of(run / "checkpoints" / "step-00000007"))


@pytest.mark.parametrize(
    ("tables", "features", "message"),
    [
        (("usr",), {}, "step-00000007 has no table 'usr'; it has room, user"),
        (("room",), {}, "this model has no table 'room'; it has author, item, side, user"),
        (("item",), {}, "step-00000007 has no table 'item'"),
        ((), {"user": {"dim": 8}}, "table 'user' had dim = 16 and has 8 now; set features.user.dim = 16"),
        (("user",), {"exclude": ["user_id"]}, "this model has no table 'user'; it has author, item, side"),
        ((), {"exclude": ["user_id"], "user": {"dim": 8}}, "has no table in common with this model"),
    ],
)
def test_what_does_not_fit_is_named(run: Path, tables: tuple[str, ...], features: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_source(config_of(run, tables, **features))
    assert message in str(error.value)


def test_a_missing_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint and no run with checkpoints here"):
        check_source(config_of(tmp_path / "none"))
    with pytest.raises(UserError, match=r"need a `run` to copy from; set init_from\.run"):
        config_of("", ("user",))


def test_a_network_that_read_vectors_of_another_model_has_another_meaning() -> None:
    """Width and keys may be equal: a projection of one model's vectors means nothing for those of another one."""
    layout = {"behaviours": ["click"], "candidates": ["live"], "side": [], "dense": [], "statistics": []}
    config = config_of("run", content={"title": {"table": "t", "of": "item"}})

    def meaning(**facts: Any) -> dict[str, Any]:
        known = {"hash": "h", "width": 3, "dtype": "float16", "count": 5, "model": "small", "origin": "o"} | facts
        none = np.zeros(0)
        fitted = FittedFeatures(layout, {}, none, none, none, content={"title": TableFacts(**known)})
        return network_meaning(config, fitted, ("click",))

    assert meaning() == meaning(hash="later", count=9)
    for other in ({"model": "large"}, {"origin": "adapted"}, {"width": 4}):
        differing = [name for name, value in meaning().items() if value != meaning(**other)[name]]
        assert differing == ["features.content"]
