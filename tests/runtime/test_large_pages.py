"""Large pages: the setting of the system, and memory for which they were requested."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.forked import forked
from tests.memory_flags import kilobytes, memory_flags, own_memory
from trainer.runtime import large_pages
from trainer.runtime.large_pages import (
    LARGE_PAGE,
    large_pages_setting,
    without_copies_in_children,
    zero_in_large_pages,
)


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


needs_large_pages = pytest.mark.skipif(
    large_pages_setting() not in ("always", "madvise"), reason="this system has no large pages"
)


@needs_large_pages
def test_the_kernel_is_asked_for_large_pages() -> None:
    # Freed memory of another tensor may have been asked for large pages already.
    values = own_memory(5)
    assert "hg" not in memory_flags(values)
    assert zero_in_large_pages(values)
    assert "hg" in memory_flags(values)


@needs_large_pages
@pytest.mark.parametrize("left_out", [True, False])
def test_memory_that_children_do_not_get_keeps_its_large_pages_and_is_not_doubled(left_out: bool) -> None:
    values = own_memory(9)
    zero_in_large_pages(values)
    large = kilobytes(values, "AnonHugePages")
    if not large:
        pytest.skip("this system has no free large pages")
    with without_copies_in_children() if left_out else nullcontext():
        child = forked()
        child.__enter__()
    shared = kilobytes(values, "Shared_Dirty")
    values.fill_(1)
    found = kilobytes(values, "AnonHugePages")
    child.__exit__(None, None, None)
    assert (values == 1).all()
    if left_out:
        assert shared == 0 and found >= large
    else:  # The fork alone makes all of it common. What a write then does to a large page differs between kernels.
        assert shared >= large


def test_memory_is_left_out_of_children_inside_the_block_only() -> None:
    values = own_memory(5)
    zero_in_large_pages(values)
    with without_copies_in_children():
        assert "dc" in memory_flags(values)
    assert "dc" not in memory_flags(values)
    with pytest.raises(RuntimeError, match="fork"), without_copies_in_children():
        raise RuntimeError("the fork fails")
    assert "dc" not in memory_flags(values)


def test_memory_of_a_freed_tensor_is_copied_into_children() -> None:
    memory = own_memory(5)
    values = memory[:]
    zero_in_large_pages(values)
    del values
    reused = memory[:]
    reused.fill_(7)
    with without_copies_in_children():
        assert "dc" not in memory_flags(reused)
        child = os.fork()
        if not child:
            os._exit(int(reused[len(reused) // 2]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
