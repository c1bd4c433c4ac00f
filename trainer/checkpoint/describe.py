"""Describes the content of a checkpoint, and verifies its files against the manifest."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import (
    ADAPTER,
    ALIGN,
    FORESIGHT,
    MANIFEST,
    check_complete,
    check_files,
    checkpoints_at,
    read_manifest,
)
from trainer.checkpoint.reader import Checkpoint
from trainer.console.errors import UserError
from trainer.console.text_table import shape_text, size_text, text_table
from trainer.sparse.dynamic_ids import COUNTS, IdCounts

LISTED = 5
"""Most problems that the one-line error about broken checkpoints lists."""


def describe_checkpoint(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint as JSON-ready values: its manifest, and the sizes of tables, network and files.

    Raises:
        UserError: there is no checkpoint, or it is incomplete.
    """
    checkpoint = Checkpoint.open(path)
    manifest, model = checkpoint.manifest, checkpoint.model
    tables = []
    for entry in manifest.tables:
        if entry.table not in model.tables:
            raise UserError(f"{checkpoint.directory}: the manifest has a table {entry.table!r}, the model has none")
        stored = model.tables[entry.table]
        states = {name: {"shape": list(state.shape), "bytes": state.bytes} for name, state in stored.states.items()}
        table = {**entry.model_dump(mode="json"), "bytes": stored.weight.bytes, "states": states}
        if stored.ids:
            table["ids"] = {
                **asdict(IdCounts.of(stored.ids[COUNTS].read())),
                "bytes": sum(tensor.bytes for tensor in stored.ids.values()),
            }
        tables.append(table)
    dense = {name: list(slots["parameter"].shape) for name, slots in model.dense.items()}
    return {
        "path": str(checkpoint.directory),
        **manifest.model_dump(mode="json", exclude={"tables", "dense", "files"}),
        "tables": tables,
        "dense": dense,
        "dense_values": sum(slots["parameter"].elements for slots in model.dense.values()),
        "dense_bytes": sum(tensor.bytes for slots in model.dense.values() for tensor in slots.values()),
        "averaged": any("average" in slots for slots in model.dense.values()),
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "bytes": manifest.bytes,
    }


def format_checkpoint(found: dict[str, Any], *, everything: bool = False) -> str:
    """Format the result of :func:`describe_checkpoint` as text.

    Args:
        found: the description.
        everything: list every dense parameter, position and file.
    """
    state = "finished" if found["finished"] else "training has not finished"
    rows, network = "rows", f"{found['kind']} for {', '.join(found['behaviours'])}"
    if found["kind"] == ADAPTER:
        rows, network = "sequences", "adapter of a language model"
    elif found["kind"] == ALIGN:
        network = f"two towers of users and authors for {', '.join(found['behaviours'])}"
    elif found["kind"] == FORESIGHT:
        network = "Foresight's predictor of the next code"
    facts = [
        ("checkpoint", found["path"]),
        ("step", f"{found['step']:,} ({state}); save {found['number']} of its run, {found['created']}"),
        (rows, f"{found['rows_done']:,} {_share(found)}"),
        ("written by", f"{_count(found['ranks'], 'rank')}, ZeRO stage {found['zero_stage']}"),
        ("network", network),
        ("", f"{_count(len(found['dense']), 'parameter')} of {found['dense_values']:,} values"),
        ("", f"{size_text(found['dense_bytes'])} with the moments of AdamW{' and means' if found['averaged'] else ''}"),
        ("tables' optimizer", found["table_optimizer"]),
        ("dataset", f"{found['dataset']['path']} (fingerprint {found['dataset']['fingerprint']})"),
        *((f"ids of {table['table']}", _ids(table)) for table in found["tables"] if "ids" in table),
        ("positions", _positions(found["positions"], _is_stream(found))),
        ("files", f"{len(found['files'])} of {size_text(found['bytes'])}"),
    ]
    blocks = ["\n".join(f"{name:<19}{value}" for name, value in facts)]
    if found["tables"]:
        blocks.append(_tables(found["tables"]))
    if everything:
        shapes = [[name, shape_text(shape)] for name, shape in found["dense"].items()]
        shapes += [[name, shape_text(shape)] for name, shape in found["buffers"].items()]
        blocks.append(text_table(["dense parameter", "shape"], shapes))
        positions = [[str(key), *(f"{value:,}" for value in place)] for key, place in found["positions"].items()]
        meaning = (
            ["place", "inside", "latest ms", "rejected"] if _is_stream(found) else ["epoch", "window", "rows of it"]
        )
        if positions:
            blocks.append(text_table(["partition", *meaning], positions))
        blocks.append(text_table(["file", "bytes"], [[name, f"{size:,}"] for name, size in found["files"].items()]))
    return "\n\n".join(blocks)


def verify_checkpoints(path: str | Path) -> list[dict[str, Any]]:
    """Read every file of a checkpoint, or of all checkpoints of a run, and compare it with the manifest.

    Returns:
        For each checkpoint ``path``, ``files`` (``name``, ``bytes``, ``problem``) and ``problems``: one line for each
        damaged file, or for the manifest. Empty if the checkpoint is intact.

    Raises:
        UserError: the path is neither a checkpoint nor a run with checkpoints.
    """
    directories = checkpoints_at(path)
    if not directories:
        raise UserError(f"{path}: no checkpoint and no run with checkpoints here")
    return [_verify(directory) for directory in directories]


def format_verification(found: list[dict[str, Any]]) -> str:
    """Format the result of :func:`verify_checkpoints` as a table with one line for each file."""
    lines = []
    for checkpoint in found:
        name = Path(checkpoint["path"]).name
        lines += [[name, file["name"], f"{file['bytes']:,}", file["problem"] or "ok"] for file in checkpoint["files"]]
        if not checkpoint["files"]:
            lines.append([name, MANIFEST, "-", checkpoint["problems"][0]])
    return text_table(["checkpoint", "file", "bytes", "state"], lines, texts=2)


def broken_line(found: list[dict[str, Any]]) -> str | None:
    """Summarise the damage in one line; ``None`` if all files are intact."""
    broken = [
        f"{Path(checkpoint['path']).name}: {problem}" for checkpoint in found for problem in checkpoint["problems"]
    ]
    if not broken:
        return None
    more = f"; and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
    checkpoints = sum(bool(checkpoint["problems"]) for checkpoint in found)
    return f"{checkpoints} of {_count(len(found), 'checkpoint')} broken: {'; '.join(broken[:LISTED])}{more}"


def _verify(directory: Path) -> dict[str, Any]:
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        return {"path": str(directory), "files": [], "problems": [str(error)]}
    files = []
    for name, entry in manifest.files.items():
        problems = check_files(directory, manifest, [name])
        files.append({"name": name, "bytes": entry.bytes, "problem": problems[0] if problems else None})
    problems = [str(file["problem"]) for file in files if file["problem"]]
    return {"path": str(directory), "files": files, "problems": problems or check_complete(directory, manifest)}


def _tables(tables: list[dict[str, Any]]) -> str:
    lines = []
    for table in tables:
        shards = {f"{rows:,} x {columns}" for rows, columns in table["shards"]}
        cut = f"{len(table['shards'])} of {' or '.join(sorted(shards))}"
        states = ", ".join(f"{name} {shape_text(state['shape'])}" for name, state in table["states"].items())
        size = table["bytes"] + sum(state["bytes"] for state in table["states"].values())
        size += table.get("ids", {}).get("bytes", 0)
        lines.append(
            [
                table["table"],
                table["sharding"],
                cut,
                states or "none",
                f"{table['rows']:,}",
                str(table["dim"]),
                size_text(size),
            ]
        )
    return text_table(["table", "sharding", "shards", "optimizer state", "rows", "dim", "size"], lines, texts=4)


def _ids(table: dict[str, Any]) -> str:
    """Format the counts of a dynamic table's ids. Row 0 belongs to no id."""
    counts = IdCounts(**{name: value for name, value in table["ids"].items() if name != "bytes"})
    return f"{counts.admitted - counts.evicted:,} of {table['rows'] - 1:,} rows taken; {counts}"


def _positions(positions: dict[str, list[int]], stream: bool) -> str:
    if not positions:
        return "none"
    partitions = _count(len(positions), "partition")
    if stream:
        latest_ms = max(place[2] for place in positions.values())
        if not latest_ms:
            return f"{partitions} of a stream, no events yet"
        latest = time.strftime("%F %T", time.gmtime(latest_ms / 1000))
        return f"{partitions} of a stream, events up to {latest} UTC"
    epochs = sorted({place[0] for place in positions.values()})
    text = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
    return f"{partitions} in {text} (from 0)"


def _is_stream(found: dict[str, Any]) -> bool:
    """True if the run trains on a stream, whose number of rows is unknown."""
    return not found["rows_total"]


def _share(found: dict[str, Any]) -> str:
    if _is_stream(found):
        return "of a stream"
    return f"of {found['rows_total']:,} ({100 * found['rows_done'] / found['rows_total']:.1f} %)"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
