"""Names in an MLflow file store: accepted, distinct, and the same at each start."""

from __future__ import annotations

import pytest

from trainer.runtime.mlflow_names import StoreNames


def test_a_name_that_is_accepted_stays() -> None:
    names = StoreNames()
    for name in ("loss", "held_out/click/auc", "progressive_auc/点击", "level 1/distortion", "a-b.c:d"):
        assert names.of(name) == name == names.of(name)


@pytest.mark.parametrize("name", ["", "qa/", "./x", "../x", "/x", "a//b", "q" * 260, "任" * 100, "a<b", "\ud800", "\n"])
def test_another_name_has_parts_and_length_that_are_accepted(name: str) -> None:
    made = StoreNames().of(name)
    assert made != name and made == StoreNames().of(name)
    assert len(made.encode()) <= 250 and not {"", ".", ".."} & set(made.split("/"))
    assert len({StoreNames().of(name + more) for more in ("", "<", ">")}) == 3


@pytest.mark.parametrize("order", [["x", "x/y", "x/y/z"], ["x/y/z", "x/y", "x"], ["x/y", "x", "x/y/z"]])
def test_a_file_and_a_directory_have_different_names(order: list[str]) -> None:
    names = StoreNames()
    made = {name: names.of(name) for name in order}
    assert made[order[0]] == order[0] and len(set(made.values())) == 3
    for first in made.values():
        assert not any(second.startswith(f"{first}/") for second in made.values())
    again = StoreNames(made.values())
    assert {name: again.of(name) for name in reversed(order)} == made
