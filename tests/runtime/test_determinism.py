"""The key ``train.deterministic`` switches deterministic kernels on before a job touches its device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.finetune
import trainer.rank
from tests.llm.tiny import write_samples
from trainer.console.errors import UserError
from trainer.runtime.determinism import use_deterministic_kernels
from trainer.runtime.distributed import World

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the process as it was."""
    monkeypatch.setenv(CUBLAS, "")
    monkeypatch.delenv(CUBLAS)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_torch_fbgemm_and_cublas_are_asked_for_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_deterministic_kernels()
    # fbgemm's backward pass and NCCL's process group read the same flag of torch.
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ[CUBLAS] == ":4096:8"
    monkeypatch.setenv(CUBLAS, ":16:8")
    use_deterministic_kernels()
    assert os.environ[CUBLAS] == ":16:8", "a value of the user stays"


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("job", ["rank", "finetune"])
def test_a_job_asks_before_it_joins(
    job: str, deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path)
    seen: list[bool] = []

    def join(device: str, bind_cores: bool = False) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise UserError("enough")

    monkeypatch.setattr(World, "join", join)
    main: Callable[[list[str]], int] = {"rank": trainer.rank.main, "finetune": trainer.finetune.main}[job]
    arguments = {
        "rank": ["configs/simulated.toml"],
        "finetune": [
            *("configs/finetune_small.toml", f'data.train=["{tmp_path}/train.jsonl"]', "data.general=[]"),
            *(f'data.evaluate=["{tmp_path}/eval.jsonl"]', "data.general_share=0"),
        ],
    }[job]
    assert main([*arguments, f"train.deterministic={str(deterministic).lower()}"]) == 2
    assert seen == [deterministic]
