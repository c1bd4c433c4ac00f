"""Fixture of the tiny base model, made once for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.llm.tiny import write_base
from trainer.llm.models.base_model import BaseModelFiles


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModelFiles:
    return write_base(tmp_path_factory.mktemp("llm") / "base")
