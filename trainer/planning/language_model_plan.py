"""Plan of a fine-tuning job on a described cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.deepspeed import is_enabled
from trainer.config.finetune import FinetuneConfig
from trainer.config.toml import read_toml
from trainer.console.errors import UserError
from trainer.llm.finetuning.prepare import deepspeed_settings
from trainer.llm.models.base_model import add_adapter, empty_model, is_hub_id, quiet_libraries
from trainer.llm.models.small_model import small_shape
from trainer.planning.accelerators import GIGA, Cluster
from trainer.planning.dense_memory import ZeroSettings, dense_memory
from trainer.planning.language_model_cost import ModelShape, kept_bytes, step_flops, working_bytes
from trainer.planning.ranker_plan import RUNTIME_BYTES, Assumptions
from trainer.planning.step_time import reduce_seconds
from trainer.runtime.stored_files import read_json_object

MODEL_FILE = Path(__file__).with_name("language_models.toml")
"""Shapes of models that a job may name by their hub id."""

LANGUAGE_MODEL_MFU = 0.4
"""Share of the peak rate that the products of a language model reach. An assumption; benchmarks/results/finetune.json
has 0.33 on a CPU."""

_SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def model_shape(config: FinetuneConfig) -> ModelShape:
    """Return the shape of a job's model, with the adapter that the job adds; no weight is read.

    Raises:
        UserError: the model's shape is not known, or it has no layer that the adapter names.
    """
    quiet_libraries()
    sizes = _sizes(config)
    layers = sizes["num_hidden_layers"]
    # All layers are alike, so two small models tell how the counts grow, also where 80 layers would take long to build.
    one, two = (_count(config, {**sizes, "num_hidden_layers": few}) for few in (1, 2))
    counts = {name: one[name] + (layers - 1) * (two[name] - one[name]) for name in one}
    width = sizes["hidden_size"] // sizes["num_attention_heads"]
    return ModelShape(
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        layers=layers,
        kv_width=width * sizes["num_key_value_heads"],
        vocabulary=sizes["vocab_size"],
        # Embeddings cost no product, and the output head is counted by its tokens.
        linear=counts["layers"] - counts["trained of layers"],
        head=sizes["hidden_size"] * sizes["vocab_size"],
        parameters=counts["all"],
        trained=counts["trained"],
        adapter_width=two["adapters"] - one["adapters"],
        dropped=two["inputs"] - one["inputs"] if config.lora.dropout else 0,
    )


def _count(config: FinetuneConfig, sizes: Mapping[str, Any]) -> dict[str, int]:
    """Return numbers of weights of a model with the job's adapter, and sums of its adapters' ranks and input widths."""
    from transformers import Qwen2Config

    model = add_adapter(empty_model(Qwen2Config(**sizes)), config.lora, config.model.path)
    weights = dict(model.named_parameters())
    trained = {name: value for name, value in weights.items() if value.requires_grad}
    return {
        "all": sum(value.numel() for value in weights.values()),
        "trained": sum(value.numel() for value in trained.values()),
        "layers": sum(value.numel() for name, value in weights.items() if ".layers." in name),
        "trained of layers": sum(value.numel() for name, value in trained.items() if ".layers." in name),
        "adapters": sum(value.shape[0] for name, value in trained.items() if ".lora_A." in name),
        "inputs": sum(value.shape[1] for name, value in trained.items() if ".lora_A." in name),
    }


def _sizes(config: FinetuneConfig) -> dict[str, Any]:
    """Return the sizes of a job's base model, in the keys of its ``config.json``."""
    path = config.model.path
    if not path:
        return small_shape(config.small, config.small.vocabulary, config.data.length)
    if Path(path).is_dir():
        try:
            found = read_json_object(Path(path) / "config.json")
        except OSError:
            raise UserError(f"model.path = {path!r}: no model here (config.json cannot be read)") from None
        missing = [key for key in _SHAPE_KEYS if key not in found and key != "tie_word_embeddings"]
        if missing or found.get("model_type", "qwen2") != "qwen2":
            raise UserError(f"{path}: config.json is not of a model of the Qwen2 family")
        return {"tie_word_embeddings": False, **{key: found[key] for key in _SHAPE_KEYS if key in found}}
    known: Mapping[str, Any] = read_toml(MODEL_FILE, "file of models")
    if path not in known:
        what = "its shape is not known here" if is_hub_id(path) else "no such directory"
        raise UserError(
            f"model.path = {path!r}: {what}; name a directory with its config.json, or one of {', '.join(known)}"
        )
    return dict(known[path])


def plan_finetune(config: FinetuneConfig, cluster: Cluster, assumed: Assumptions, answers: float) -> dict[str, Any]:
    """Return the plan of a job as JSON: memory, largest batch, tokens per second, problems and what would solve them.

    Args:
        config: the job.
        cluster: the cluster.
        assumed: the share of the peak rate.
        answers: share of the tokens that have a loss.

    Raises:
        UserError: the job has a setting that no cluster accepts, or its model's shape is not known.
    """
    settings = deepspeed_settings(config, cluster.gpus)
    shape = model_shape(config)
    bf16 = is_enabled(settings.get("bf16"))
    if cluster.accelerator.device == "cpu":
        shape = shape._replace(mask_bytes=2 if bf16 else 4)
    given = settings["zero_optimization"]
    zero = ZeroSettings(
        given.get("stage", 0),
        bf16,
        is_enabled(given.get("offload_optimizer")),
        is_enabled(given.get("offload_param")),
    )
    parts, rows = settings["gradient_accumulation_steps"], settings["train_micro_batch_size_per_gpu"]
    checkpointing = config.model.gradient_checkpointing
    mfu = LANGUAGE_MODEL_MFU if assumed.mfu is None else assumed.mfu
    figures, length = cluster.accelerator, config.data.length
    memory, host = _memory(shape, zero, cluster, rows * length, answers, checkpointing)
    total = sum(memory.values())
    largest = _largest_rows(lambda n: _memory(shape, zero, cluster, n * length, answers, checkpointing)[0], figures)
    compute, network = _seconds(shape, zero, cluster, rows * length, length, answers, checkpointing, parts, mfu)
    # Stage 3 collects the next layer while it computes this one; stages 1 and 2 reduce after the backward pass.
    seconds = max(compute, network) if zero.stage == 3 else compute + network
    snapshot = 12 * shape.trained if config.checkpoint.background else 0
    document: dict[str, Any] = {
        "kind": "finetune",
        "cluster": cluster.model_dump(),
        "model": {**shape._asdict(), "path": config.model.path or "small"},
        "zero": {
            "stage": zero.stage,
            "bf16": zero.bf16,
            "offload_optimizer": zero.offload_optimizer,
            "offload_parameters": zero.offload_parameters,
            "gradient_checkpointing": checkpointing,
        },
        "rows_per_micro_batch": rows,
        "largest_rows_per_micro_batch": largest,
        "largest_batch_size": largest * parts * cluster.gpus,
        "memory": {"capacity": figures.memory_bytes, "fullest": memory, "fullest_total": total},
        "host_memory": {
            "capacity": figures.host_bytes,
            "parts": {"offloaded": host, "checkpoint snapshot": snapshot},
            "total": host + snapshot,
        },
        "step": {
            "seconds": seconds,
            "parts": {"compute": compute, "network": network},
            "bottleneck": "compute" if compute >= network else "network",
            "tokens_per_second": cluster.gpus * parts * rows * length / seconds,
        },
        "assumptions": {"answers": answers, "mfu": mfu},
    }
    problems = []
    if total > figures.memory_bytes:
        problems.append(f"a rank needs {total / GIGA:,.1f} GB, and its memory has {figures.memory_gb:,.1f} GB")
    if host + snapshot > figures.host_bytes:
        problems.append(
            f"a rank needs {(host + snapshot) / GIGA:,.1f} GB of host memory, and its share has "
            f"{figures.host_memory_gb:,.1f} GB"
        )
    document["problems"] = problems
    document["remedies"] = (
        _remedies(shape, zero, cluster, rows, length, answers, checkpointing, largest)
        if total > figures.memory_bytes
        else []
    )
    return document


def _memory(
    shape: ModelShape, zero: ZeroSettings, cluster: Cluster, tokens: float, answers: float, checkpointing: bool
) -> tuple[dict[str, int], int]:
    """Return the parts of a rank's memory on the device, and its bytes in host memory."""
    of_layer = (shape.parameters - 2 * shape.head) // shape.layers if shape.layers else 0
    dense = dense_memory(shape.parameters, shape.trained, cluster.gpus, zero, max(of_layer, shape.head))
    element = 2 if zero.bf16 else 4
    kept = kept_bytes(shape, tokens, element, checkpointing=checkpointing)
    work = working_bytes(shape, tokens, answers * tokens, element, checkpointing=checkpointing)
    parts = {
        "weights": dense.weights,
        "gathered weights": dense.gathered,
        "gradients": dense.gradients,
        "optimizer": dense.optimizer,
        "activations": round(kept),
        "loss or one layer": round(work),
        "process": RUNTIME_BYTES[cluster.accelerator.device],
    }
    return parts, dense.host


def _largest_rows(memory: Callable[[int], dict[str, int]], figures: Any) -> int:
    """Return the largest number of sequences of a micro-batch that fits; 0 if none does."""
    fixed, one = sum(memory(0).values()), sum(memory(1).values())
    if one > figures.memory_bytes:
        return 0
    # All parts are linear in the number of sequences.
    return int((figures.memory_bytes - fixed) // max(1, one - fixed))


def _seconds(
    shape: ModelShape,
    zero: ZeroSettings,
    cluster: Cluster,
    tokens: float,
    length: float,
    answers: float,
    checkpointing: bool,
    parts: int,
    mfu: float,
) -> tuple[float, float]:
    """Return the seconds of a step's products, and of its transfers."""
    figures, element = cluster.accelerator, 2 if zero.bf16 else 4
    flops = step_flops(shape, tokens, length, answers * tokens, checkpointing=checkpointing)
    compute = parts * flops / (mfu * figures.flops_per_s(bf16=zero.bf16))
    network = reduce_seconds(element * shape.trained, cluster)
    link = 0.0
    if zero.stage == 3:
        # Weights are collected for the forward and the backward pass, and for what is computed again: half an
        # all-reduce each.
        network += parts * (2 + checkpointing) * reduce_seconds(element * shape.parameters, cluster) / 2
        if zero.offload_parameters:
            link += parts * (2 + checkpointing) * element * shape.parameters / cluster.gpus
    if zero.offload_optimizer:
        link += 2 * element * shape.trained / cluster.gpus
    return compute, network + link / (GIGA * figures.host_link_gb_per_s)


def _remedies(
    shape: ModelShape,
    zero: ZeroSettings,
    cluster: Cluster,
    rows: int,
    length: int,
    answers: float,
    checkpointing: bool,
    largest: int,
) -> list[dict[str, Any]]:
    """Return changes, each beside those before it, and whether the job fits after it."""
    capacity, found = cluster.accelerator.memory_bytes, []

    def add(change: str, stages: ZeroSettings, sequences: int, again: bool) -> None:
        memory, _ = _memory(shape, stages, cluster, sequences * length, answers, again)
        needed = sum(memory.values())
        found.append({"change": change, "fits": needed <= capacity, "needs": needed, "has": capacity})

    if largest:
        add(f"micro-batches of {largest} sequences (gradient_accumulation_steps)", zero, largest, checkpointing)
    if not checkpointing:
        add("model.gradient_checkpointing = true", zero, rows, True)
    if rows > 1:
        add("the same with micro-batches of 1 sequence", zero, 1, True)
    if not zero.bf16:
        zero = replace(zero, bf16=True)
        add("the same with bf16", zero, 1, True)
    if zero.stage < 3:
        zero = replace(zero, stage=3)
        add("the same with ZeRO stage 3", zero, 1, True)
    if not zero.offload_optimizer:
        zero = replace(zero, offload_optimizer=True)
        add("the same with offload_optimizer", zero, 1, True)
    if not zero.offload_parameters:
        zero = replace(zero, offload_parameters=True)
        add("the same with offload_param", zero, 1, True)
    return found
