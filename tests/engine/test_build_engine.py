"""The engine of a job gets the job's precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainer.config.ranker import load_config
from trainer.engine import build_engine


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_engine_gets_bf16_and_only_a_gpu_gets_tf32(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str
) -> None:
    matmul: list[str] = []
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch, "set_float32_matmul_precision", matmul.append)
    monkeypatch.setattr(build_engine, "HybridEngine", lambda *tables, **options: given.update(options))
    compiled = precision == "tf32"
    config = load_config("configs/simulated.toml", [f"train.precision={precision}"])
    world: Any = SimpleNamespace(size=1, device=torch.device(device))
    build_engine.make_engine(config, [], [], nn.Linear(1, 1), None, world, compiled=compiled)  # type: ignore[arg-type]
    assert given["compiler"] == ("inductor" if compiled else None)
    assert given["deepspeed"].get("bf16") == ({"enabled": True} if precision == "bf16" else None)
    assert matmul == (["high"] if (precision, device) == ("tf32", "cuda") else [])
