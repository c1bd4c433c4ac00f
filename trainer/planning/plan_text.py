"""A plan as text, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.console.text_table import size_text, text_table
from trainer.planning.accelerators import GIGA


def format_plan(plan: Mapping[str, Any]) -> str:
    """Return the plan of a ranker's or of a fine-tuning job as text."""
    cluster, figures = plan["cluster"], plan["cluster"]["accelerator"]
    head = (
        f"{cluster['gpus']} x {cluster['name']}, {figures['memory_gb']:g} GB each, hosts: {cluster['hosts']}; a plan, "
        "not a measurement"
    )
    parts = [head]
    parts.append(_tables(plan) if plan["kind"] == "train" else _model(plan))
    parts.append(_memory(plan))
    parts.append(_step(plan))
    parts.append("assumed: " + ", ".join(f"{name} {value}" for name, value in plan["assumptions"].items()))
    if plan.get("faster"):
        parts.append("faster:\n" + "\n".join(map(_faster, plan["faster"])))
    if plan["problems"]:
        parts.append("does not fit:\n" + "\n".join(f"  {problem}" for problem in plan["problems"]))
    if plan["remedies"]:
        parts.append("what would help, each change alone:\n" + _remedies(plan))
    return "\n\n".join(parts)


def _faster(change: Mapping[str, Any]) -> str:
    """Return a change that shortens a step, as a line."""
    return f"  {change['change']}: {1000 * change['seconds']:.1f} ms a step, then limited by {change['bottleneck']}"


def _tables(plan: Mapping[str, Any]) -> str:
    """Return the placement of the tables."""
    lines = []
    for table in plan["tables"]:
        largest = max(table["shards"])
        ranks = sorted(set(table["ranks"]))
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
        lines.append(
            [
                table["table"],
                table["sharding"],
                table["kernel"],
                where,
                f"{table['rows']:,} x {table['dim']}",
                size_text(4 * table["rows"] * table["dim"]),
                f"{largest[0]:,} x {largest[1]}",
                f"{table['ids_per_step']:,.0f}",
                f"{table['distinct_ids_per_step']:,.0f}",
                f"{table['share_of_busiest_rank']:.1%}".replace("%", " %"),
            ]
        )
    header = [
        "table",
        "sharding",
        "kernel",
        "on",
        "size",
        "bytes",
        "largest shard",
        "ids a step",
        "distinct",
        "busiest rank",
    ]
    return text_table(header, lines, texts=4)


def _model(plan: Mapping[str, Any]) -> str:
    """Return the model, its ZeRO settings and its batch."""
    model, zero = plan["model"], plan["zero"]
    offload = [name for name in ("offload_optimizer", "offload_parameters") if zero[name]]
    recomputed = "on" if zero["gradient_checkpointing"] else "off"
    return (
        f"{model['path']}: {model['parameters']:,} weights, {model['trained']:,} of them trained\n"
        f"ZeRO stage {zero['stage']}, {'bf16' if zero['bf16'] else 'float32'}, "
        f"offload: {', '.join(offload) or 'none'}, gradient checkpointing: {recomputed}\n"
        f"micro-batch: {plan['rows_per_micro_batch']} sequences a rank; {plan['largest_rows_per_micro_batch']} would "
        f"fit (train.batch_size = {plan['largest_batch_size']:,})"
    )


def _memory(plan: Mapping[str, Any]) -> str:
    """Return the memory of the fullest rank by part."""
    memory, host = plan["memory"], plan["host_memory"]
    lines = [[name, size_text(size)] for name, size in memory["fullest"].items()]
    lines.append(["all", size_text(memory["fullest_total"])])
    lines.append(["of", size_text(memory["capacity"])])
    title = "memory of a rank"
    if "fullest_rank" in memory:
        title = f"memory of rank {memory['fullest_rank']}, the fullest"
        lines.append([f"rank {memory['emptiest_rank']}, the emptiest", size_text(memory["emptiest_total"])])
    for name, size in host["parts"].items():
        lines.append([f"host: {name}", size_text(size)])
    if host["parts"]:
        lines.append(["host: all, of " + size_text(host["capacity"]), size_text(host["total"])])
    return text_table([title, "bytes"], lines)


def _step(plan: Mapping[str, Any]) -> str:
    """Return the time of a step by part."""
    step = plan["step"]
    lines = [
        [name, f"{1000 * seconds:.2f}", f"{100 * seconds / step['seconds']:.0f} %"]
        for name, seconds in step["parts"].items()
    ]
    lines.append(["step", f"{1000 * step['seconds']:.2f}", ""])
    table = text_table(["part of a step", "ms", "share"], lines)
    if plan["kind"] == "finetune":
        return f"{table}\n{step['tokens_per_second']:,.0f} tokens/s; limited by {step['bottleneck']}"
    return (
        f"{table}\n{step['rows_per_second']:,.0f} rows/s with {plan['rows_per_rank']:,} rows a rank and step; "
        f"limited by {step['bottleneck']} (rank {step['busiest_rank']}); loader processes of a host need "
        f"{step['loader_cores_per_host']} cores"
    )


def _remedies(plan: Mapping[str, Any]) -> str:
    """Return the changes that were tried."""
    return text_table(
        ["change", "fits", "needs", "has"],
        [
            [change["change"], "yes" if change["fits"] else "no", size_text(change["needs"]), size_text(change["has"])]
            for change in plan["remedies"]
        ],
        texts=2,
    )


def draw_plan(plan: Mapping[str, Any], path: Path) -> None:
    """Draw memory and step time by part, as an SVG picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    memory = plan["memory"]
    _stack(left, {name: size / GIGA for name, size in memory["fullest"].items()})
    left.axvline(memory["capacity"] / GIGA, color="black", linestyle="--", label="capacity")
    left.set(title="memory of the fullest rank", xlabel="GB")
    _stack(right, {name: 1000 * seconds for name, seconds in plan["step"]["parts"].items()})
    right.set(title="expected time of a step", xlabel="ms")
    for axes in (left, right):
        axes.set_yticks([])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, fontsize=8, frameon=False)
    # Without a date the same plan gives the same file.
    figure.savefig(path, format="svg", metadata={"Date": None})


def _stack(axes: Any, parts: Mapping[str, float]) -> None:
    """Draw parts side by side as one bar."""
    start = 0.0
    for name, size in parts.items():
        axes.barh(0, size, left=start, label=name)
        start += size
