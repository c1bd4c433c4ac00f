"""Compares two checkpoints: settings, shapes, and values, one block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.checkpoint.reader import BLOCK_BYTES, Checkpoint, StoredTensor
from trainer.config.diff import flat_settings
from trainer.console.text_table import shape_text, text_table

_RECORD = ("step", "rows_done", "finished", "ranks", "zero_stage", "kind", "behaviours", "table_optimizer", "dataset")
"""Entries of the manifest that are compared in addition to the settings."""


def diff_checkpoints(first: str | Path, second: str | Path, block_bytes: int = BLOCK_BYTES) -> dict[str, Any]:
    """Compare two checkpoints; the result is JSON-ready.

    Returns:
        ``settings``: key -> the two values, for settings of the job and entries of the manifests that differ.
        ``only_first``, ``only_second``: names of tensors that only one has. ``shapes``: name -> the two shapes, if they
        differ. ``tensors``: name -> ``elements``, ``differing`` (number of unequal elements) and ``largest``
        (absolute difference, ``None`` if one of the values is NaN), for tensors of equal shape. ``equal``: True if all
        tensors are equal, bit for bit up to the sign of zero.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    a, b = Checkpoint.open(first), Checkpoint.open(second)
    ours, theirs = a.model.tensors, b.model.tensors
    common = [name for name in ours if name in theirs]
    shapes = {name: [list(ours[name].shape), list(theirs[name].shape)] for name in common}
    shapes = {name: both for name, both in shapes.items() if both[0] != both[1]}
    tensors = {name: _compare(ours[name], theirs[name], block_bytes) for name in common if name not in shapes}
    only_first = [name for name in ours if name not in theirs]
    only_second = [name for name in theirs if name not in ours]
    differing = any(entry["differing"] for entry in tensors.values())
    return {
        "first": str(a.directory),
        "second": str(b.directory),
        "settings": dict(_settings(a, b)),
        "only_first": only_first,
        "only_second": only_second,
        "shapes": shapes,
        "tensors": tensors,
        "equal": not (only_first or only_second or shapes or differing),
    }


def format_diff(found: dict[str, Any], *, everything: bool = False) -> str:
    """Format the result of :func:`diff_checkpoints`; equal tensors are counted, and listed with ``everything``."""
    blocks = [f"A  {found['first']}\nB  {found['second']}"]
    if found["settings"]:
        lines = [[key, str(one), str(other)] for key, (one, other) in found["settings"].items()]
        blocks.append(text_table(["setting", "A", "B"], lines, texts=3))
    lines = [line for which, of in (("only_first", "A"), ("only_second", "B")) for line in _only(found[which], of)]
    lines += [
        [name, f"{shape_text(one)} in A, {shape_text(other)} in B"] for name, (one, other) in found["shapes"].items()
    ]
    if lines:
        blocks.append(text_table(["tensor", "is"], lines, texts=2))
    shown = {name: entry for name, entry in found["tensors"].items() if everything or entry["differing"]}
    if shown:
        lines = [
            [
                name,
                f"{entry['elements']:,}",
                f"{entry['differing'] / max(1, entry['elements']):.2%}",
                "NaN" if entry["largest"] is None else f"{entry['largest']:.3g}",
            ]
            for name, entry in shown.items()
        ]
        blocks.append(text_table(["tensor", "elements", "differ", "max |A - B|"], lines))
    equal = sum(not entry["differing"] for entry in found["tensors"].values())
    verdict = "equal" if found["equal"] else "different"
    blocks.append(f"{verdict}: {equal} of {len(found['tensors'])} tensors that both have are equal in all elements")
    return "\n\n".join(blocks)


def _only(names: list[str], where: str) -> Iterator[list[str]]:
    """Yield a line for each tensor; optimizer states of a listed table are counted in the table's line."""
    for name in names:
        owner = name.partition(": ")[0]
        if owner == name:
            states = sum(other.startswith(f"{name}: ") for other in names)
            yield [name, f"only in {where}" + (f", with {states} states of its optimizer" if states else "")]
        elif owner not in names:
            yield [name, f"only in {where}"]


def _compare(ours: StoredTensor, theirs: StoredTensor, block_bytes: int) -> dict[str, Any]:
    differing, largest, nan = 0, 0.0, False
    for (_, one), (_, other) in zip(ours.blocks(block_bytes), theirs.blocks(block_bytes), strict=True):
        both_nan = one.isnan() & other.isnan()
        unequal = (one != other) & ~both_nan
        count = int(unequal.sum())
        if count:
            differing += count
            difference = (one[unequal].double() - other[unequal].double()).abs()
            nan |= bool(difference.isnan().any())
            largest = max(largest, float(difference.nan_to_num(0.0).max()))
    return {"elements": ours.elements, "differing": differing, "largest": None if nan else largest}


def _settings(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, list[Any]]]:
    ours, theirs = (_flat(checkpoint) for checkpoint in (a, b))
    for key in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(key), theirs.get(key)
        if one != other:
            yield key, [one, other]


def _flat(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest.model_dump(mode="json")
    return {key: manifest[key] for key in _RECORD} | flat_settings(checkpoint.job.model_dump(mode="json"))
