"""Compilers that a library needs while a job runs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from trainer.runtime.compilers import triton_compiles


def test_triton_needs_a_gpu_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    assert triton_compiles(torch.device("cuda")) and not triton_compiles(torch.device("cpu"))
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not triton_compiles(torch.device("cuda"))
