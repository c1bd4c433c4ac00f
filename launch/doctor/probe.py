"""Probes that the doctor runs in separate processes, since a broken installation may crash instead of raising.

``python -m launch.doctor.probe lookup`` and ``... all_reduce BACKEND`` print one line of JSON as their last line.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from launch.machine import free_port
from launch.python_path import safe_environment

TIMEOUT_SECONDS = 120.0


class ProbeError(Exception):
    """A probe failed; the message is its last line on stderr, or how it ended."""


def run_probe(*arguments: str) -> dict[str, Any]:
    """Run a probe and return the JSON object that it prints.

    Raises:
        ProbeError: it crashed, raised or hung.
    """
    return _result(_start(arguments, {}))


def run_probes(*arguments: str, ranks: int) -> list[dict[str, Any]]:
    """Run one probe on each of ``ranks`` processes that form a group on the loopback interface.

    Raises:
        ProbeError: one of them crashed, raised or hung.
    """
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = [_start(arguments, {**rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]
    try:
        return [_result(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def _start(arguments: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.doctor.probe", *arguments],
        env={"OMP_NUM_THREADS": "1", **safe_environment(os.environ), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise ProbeError(f"no answer within {TIMEOUT_SECONDS:.0f} s") from None
    if process.returncode:
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        how = f"killed by signal {-process.returncode}" if process.returncode < 0 else "no reason given"
        raise ProbeError(lines[-1] if lines and process.returncode > 0 else how)
    result: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return result


def lookup() -> dict[str, Any]:
    """Run one fused lookup and update by fbgemm, compare them with plain torch, and import TorchRec.

    Returns:
        ``cuda_build`` (CUDA version that torch was built for, or None), ``devices`` (names of usable GPUs), and
        ``loops`` (what computes each family of compiled loops on this CPU).
    """
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from trainer.runtime.environment import computed_on_this_cpu

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(10, 4, *place)], optimizer=EmbOptimType.EXACT_SGD, learning_rate=1.0, device=device
    )
    (weight,) = table.split_embedding_weights()
    weight.data.copy_(torch.arange(40.0).reshape(10, 4))
    ids = KeyedJaggedTensor(["item"], torch.tensor([1, 2, 7]), lengths=torch.tensor([2, 1])).to(device)
    pooled = table(ids.values(), ids.offsets())
    expected = torch.stack([weight[1] + weight[2], weight[7]])
    updated = weight.clone()
    updated[[1, 2, 7]] -= 1.0
    if not torch.equal(pooled, expected):
        raise RuntimeError(f"fbgemm looked up {pooled.tolist()} instead of {expected.tolist()}")
    pooled.sum().backward()
    if not torch.equal(weight, updated):
        raise RuntimeError("fbgemm's fused update did not change the rows that were looked up by their gradient")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cuda_build": torch.version.cuda, "devices": devices, "loops": computed_on_this_cpu()}


def all_reduce(backend: str) -> dict[str, Any]:
    """Run an all-reduce over all ranks of this probe, which gives the ``sum`` of the numbers 1 to ``ranks``."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    value = torch.tensor([dist.get_rank() + 1.0], device=device)
    dist.all_reduce(value, group=dist.group.WORLD)
    result = {"sum": value.item(), "ranks": dist.get_world_size(), "host": socket.gethostname()}
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    probes: dict[str, Callable[..., dict[str, Any]]] = {"lookup": lookup, "all_reduce": all_reduce}
    print(json.dumps(probes[sys.argv[1]](*sys.argv[2:])))
