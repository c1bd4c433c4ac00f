"""TorchEasyRec's PLE and DIN, trained by its own model, sharding, optimizers and pipeline.

``benchmarks/speed/throughput.py`` starts it in the Python that its user names, with ``torchrun`` for several ranks. Its
arguments are the mode, the directory of the data, and the file of the result.

In the mode ``shipped`` it shards as it does on a CPU: each rank has a copy of the tables of sequences. ``sharded``
gives it TorchRec's own sharders, which it has on a GPU, so these tables are sharded and their optimizer is fused, too.

Its sequences have tables of their own, beside those of the same ids in the pooled inputs. Its files, its reader and its
feature generator are left out: batches are cut from arrays in memory, and no metric is computed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import text_format
from torch import distributed as dist
from torchrec.distributed.sharding_plan import get_default_sharders as all_sharders
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from tzrec import main as easyrec
from tzrec.datasets.utils import BASE_DATA_GROUP, Batch
from tzrec.models.model import TrainWrapper
from tzrec.optim import optimizer_builder
from tzrec.optim.optimizer import TZRecOptimizer
from tzrec.protos.pipeline_pb2 import EasyRecConfig
from tzrec.utils.dist_util import DistributedModelParallel, create_train_pipeline, init_process_group
from tzrec.utils.plan_util import create_planner, get_default_sharders


def pipeline_config(facts: dict[str, Any]) -> Any:
    """Return TorchEasyRec's description of the columns, the model and the optimizers."""
    tables, dim = facts["tables"], facts["dim"]
    lines = ["data_config { fg_mode: FG_NONE", *(f'label_fields: "{name}"' for name in facts["behaviours"]), "}"]
    for name, rows in tables.items():
        lines.append(
            f'feature_configs {{ id_feature {{ feature_name: "{name}" num_buckets: {rows} embedding_dim: {dim} }} }}'
        )
    lines.append(f'feature_configs {{ raw_feature {{ feature_name: "dense" value_dim: {facts["dense"]} }} }}')
    for name, table in facts["histories"].items():
        lines.append(
            f'feature_configs {{ sequence_id_feature {{ feature_name: "{name}" sequence_length: {facts["length"]} '
            f'num_buckets: {tables[table]} embedding_dim: {dim} embedding_name: "{table}_emb" }} }}'
        )
    lines.append('model_config { feature_groups { group_name: "all" group_type: DEEP')
    lines += [f'feature_names: "{name}"' for name in (*tables, "dense")]
    for name, table in facts["histories"].items():
        lines.append(
            f'sequence_groups {{ group_name: "{name}" feature_names: "{table}" feature_names: "{name}" }} '
            f'sequence_encoders {{ din_encoder {{ input: "{name}" '
            f"attn_mlp {{ hidden_units: {list(facts['attention'])} }} }} }}"
        )
    lines.append("} ple {")
    for number, widths in enumerate(facts["expert_layers"]):
        units = f"{{ hidden_units: {list(widths)} }}"
        lines.append(
            f'extraction_networks {{ network_name: "layer{number}" expert_num_per_task: {facts["task_experts"]} '
            f"share_num: {facts['shared_experts']} task_expert_net {units} share_expert_net {units} }}"
        )
    for name in facts["behaviours"]:
        lines.append(
            f'task_towers {{ tower_name: "{name}" label_name: "{name}" mlp {{ hidden_units: {list(facts["tower"])} }} '
            "losses { binary_cross_entropy {} } }"
        )
    lines.append("} }")
    lines.append(
        f"train_config {{ sparse_optimizer {{ adagrad_optimizer {{ lr: {facts['table_rate']} }} "
        "constant_learning_rate {} } "
        f"dense_optimizer {{ adam_optimizer {{ lr: {facts['dense_rate']} }} constant_learning_rate {{}} }} }}"
    )
    return text_format.Parse("\n".join(lines), EasyRecConfig())


def batches(arrays: dict[str, torch.Tensor], order: Iterable[torch.Tensor], facts: dict[str, Any]) -> Iterator[Any]:
    """Yield batches of the rows that each tensor of ``order`` names, ``[rows]`` int64."""
    keys = [*facts["tables"], *facts["histories"]]
    for rows in order:
        values = {name: array[rows] for name, array in arrays.items()}
        lengths = [facts["length"] if name in facts["histories"] else 1 for name in keys]
        sparse = KeyedJaggedTensor(
            keys=keys,
            values=torch.cat([values[name].flatten() for name in keys]),
            lengths=torch.tensor(lengths, dtype=torch.int32).repeat_interleave(len(rows)),
        )
        dense = KeyedTensor(keys=["dense"], length_per_key=[facts["dense"]], values=values["dense"])
        yield Batch(
            dense_features={BASE_DATA_GROUP: dense},
            sparse_features={BASE_DATA_GROUP: sparse},
            labels={name: values["label"][:, place] for place, name in enumerate(facts["behaviours"])},
        )


def sharded_model(mode: str, config: Any, device: torch.device, batch_size: int) -> tuple[Any, Any]:
    """Return the model on this rank and its optimizer, made as TorchEasyRec's training makes them."""
    features = easyrec._create_features(list(config.feature_configs), config.data_config)
    model = TrainWrapper(
        easyrec._create_model(config.model_config, features, list(config.data_config.label_fields)), device=device
    )
    sparse, settings = optimizer_builder.create_sparse_optimizer(config.train_config.sparse_optimizer)
    apply_optimizer_in_backward(sparse, model.model.sparse_parameters()[0], settings)
    sharders = get_default_sharders() if mode == "shipped" else all_sharders()
    planner = create_planner(device=device, batch_size=batch_size, model=model)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    model = DistributedModelParallel(module=model, device=device, sharders=sharders, plan=plan)
    dense, settings = optimizer_builder.create_dense_optimizer(config.train_config.dense_optimizer)
    remaining = dict(in_backward_optimizer_filter(model.named_parameters()))
    of_dense = KeyedOptimizerWrapper(remaining, lambda parameters: dense(parameters, **settings))
    return model, TZRecOptimizer(CombinedOptimizer([model.fused_optimizer, of_dense]))


def clock() -> float:
    """Return the seconds of a clock when the device has done all that is queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(mode: str, data: Path, out: Path) -> None:
    """Train an epoch on one rank, predict the held-out rows, and write the result from the first rank."""
    facts = json.loads((data / "workload.json").read_text())
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    device, _ = init_process_group()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(1)
    rank, own = dist.get_rank(), facts["batch"] // dist.get_world_size()
    model, optimizer = sharded_model(mode, pipeline_config(facts), device, own)
    parts = {
        part: {
            name: torch.from_numpy(array) for name, array in np.load(data / f"{part}.npz", allow_pickle=False).items()
        }
        for part in ("train", "held_out")
    }
    rows = len(parts["train"]["label"])
    steps = rows // facts["batch"]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[: steps * facts["batch"]]
    of_rank = order.view(steps, -1)[:, rank * own : (rank + 1) * own]
    model.train()
    pipeline, source, started = create_train_pipeline(model, optimizer), batches(parts["train"], of_rank, facts), 0.0
    for step in range(steps):
        if step == facts["warm_up"]:
            started = clock()
        pipeline.progress(source)
    seconds = clock() - started
    model.eval()
    held = parts["held_out"]
    # All ranks predict all rows, since each lookup is a collective.
    source = batches(held, torch.arange(len(held["label"])).split(own), facts)
    predicted, pipeline = [], create_train_pipeline(model)
    with torch.no_grad():
        for _ in range(-(-len(held["label"]) // own)):
            _, found, _ = pipeline.progress(source)
            predicted.append(torch.stack([found[f"probs_{name}"].flatten() for name in facts["behaviours"]], 1))
    if rank == 0:
        np.savez(
            out,
            rows=(steps - facts["warm_up"]) * facts["batch"],
            seconds=seconds,
            probability=torch.cat(predicted).float().cpu().numpy(),
            behaviours=np.array(facts["behaviours"]),
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
