"""Description of a dataset without rows, for plans."""

from __future__ import annotations

from pathlib import Path

from trainer.data.format.schema import DatasetSpec, DenseFeature, IdSpace, SideFeature

SPEC = DatasetSpec(
    name="described",
    source="none",
    licence="none",
    partitions=64,
    timezone="UTC",
    behaviours=("click", "like"),
    applies={"click": ("video", "live"), "like": ("video", "live")},
    candidates=("live",),
    side=(SideFeature("hour", "context", 24), SideFeature("genre", "author", 10)),
    dense=(DenseFeature("age", "user"),),
    statistics=(("item",),),
    ids={"user": IdSpace(90, 99), "author": IdSpace(9, 9), "item": IdSpace(400, 499)},
)


def write_description(directory: Path) -> Path:
    """Write ``dataset.json`` alone and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "dataset.json").write_text(SPEC.to_json())
    return directory
