"""Large pages: the setting of the system, and memory for which they were requested."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from tests.memory_flags import memory_flags
from trainer.runtime import large_pages
from trainer.runtime.large_pages import LARGE_PAGE, large_pages_setting, zero_in_large_pages


@pytest.mark.parametrize(
    ("text", "setting"),
    [("always [madvise] never\n", "madvise"), ("[always] madvise never\n", "always"), ("", None), (None, None)],
)
def test_the_setting_is_the_word_in_brackets(
    text: str | None, setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_pages, "SETTINGS", tmp_path)
    if text is not None:
        (tmp_path / "shmem_enabled").write_text(text)
    assert large_pages_setting("shmem_enabled") == setting
    assert large_pages_setting() is None


@pytest.mark.parametrize("setting", ["always [madvise] never", "always madvise [never]", None])
@pytest.mark.parametrize("bytes_", [0, 4096, 2 * LARGE_PAGE - 4, 5 * LARGE_PAGE + 12])
def test_a_tensor_is_zero_in_pages_of_any_size(
    bytes_: int, setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_pages, "SETTINGS", tmp_path)
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    # Neighbours in the same memory keep their values.
    memory = torch.ones(bytes_ // 4 + 32)
    values = memory[16:-16]
    taken = zero_in_large_pages(values)
    assert not values.any()
    assert (memory[:16] == 1).all() and (memory[-16:] == 1).all()
    values.fill_(3)
    assert (memory[15:-15].sum() == 3 * len(values) + 2).item()
    if setting is None or "[never]" in setting or bytes_ <= LARGE_PAGE:
        assert not taken


@pytest.mark.skipif(large_pages_setting() not in ("always", "madvise"), reason="this system has no large pages")
def test_the_kernel_is_asked_for_large_pages() -> None:
    # Memory of its own: freed memory of another tensor may have been asked for large pages already.
    memory = mmap.mmap(-1, 5 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = torch.frombuffer(memory, dtype=torch.float32)
    assert "hg" not in memory_flags(values)
    assert zero_in_large_pages(values)
    assert "hg" in memory_flags(values)
