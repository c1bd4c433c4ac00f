"""Checks of the machine: collectives, compiler, ports, shared memory, disk, files, threads, pages, NUMA nodes."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

from launch.doctor.check import Check
from launch.doctor.probe import ProbeError, run_probes
from launch.machine import free_port, port_in_use
from trainer.console.setup_advice import setup_command
from trainer.runtime.cores import SYSFS, available_cores, cores_near, free_cores, nvidia_gpus
from trainer.runtime.large_pages import SETTINGS, large_pages_setting, shared_memory_has_large_pages

SHARED_MEMORY_FAIL, SHARED_MEMORY_WARN = 128e6, 1e9
"""Free bytes of /dev/shm: loader processes pass batches through it, and a container has 64 MB by default."""

DISK_FAIL, DISK_WARN = 1e9, 10e9
"""Free bytes for runs, data and temporary files."""

OPEN_FILES_WARN = 1024
"""Soft limit of open files: a loader process holds a few for each batch that it prefetches."""


def check_collectives(backend: str, ranks: int) -> Check:
    """Run a real all-reduce between processes on the loopback interface."""
    try:
        results = run_probes("all_reduce", backend, ranks=ranks)
    except ProbeError as error:
        fix = "export GLOO_SOCKET_IFNAME=lo" if backend == "gloo" else "export NCCL_DEBUG=INFO, and read its messages"
        return Check(backend, "fail", f"an all-reduce of {ranks} processes failed: {error}", fix)
    wrong = [result["sum"] for result in results if result["sum"] != ranks * (ranks + 1) / 2]
    if wrong:
        return Check(backend, "fail", f"an all-reduce of {ranks} processes gave {wrong[0]}", setup_command(clean=True))
    return Check(backend, "ok", f"an all-reduce of {ranks} processes went through")


def check_compiler() -> Check:
    """Report the compilers with which DeepSpeed could build optimizers, and torch.compile a network, at run time."""
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    needed_for = "by default no job here compiles C++ at run time; train.compile = true does so with g++"
    if missing:
        return Check("compiler", "ok", f"no {' and no '.join(missing)}, not needed: {needed_for}")
    return Check("compiler", "ok", f"g++ and ninja are there, not needed: {needed_for}")


def check_port() -> Check:
    """Check the port of the rendezvous."""
    port = os.environ.get("MASTER_PORT")
    if port is None:
        return Check("port", "ok", f"free ports are available, such as {free_port()}")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        return Check("port", "fail", f"MASTER_PORT={port} is not a port; use 1 to 65535", "unset MASTER_PORT")
    if port_in_use(int(port)):
        return Check("port", "fail", f"MASTER_PORT={port} is in use by another process", "unset MASTER_PORT")
    return Check("port", "ok", f"MASTER_PORT={port} is free")


def check_shared_memory(path: str = "/dev/shm") -> Check:
    """Check the free shared memory, through which loader processes pass batches."""
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return Check("shared memory", "warn", f"{path} does not exist", "data.workers=0 reads without it")
    message = f"{_size(free)} free in {path}"
    fix = "docker run --shm-size=8g ..., or data.workers=0"
    if free < SHARED_MEMORY_FAIL:
        return Check("shared memory", "fail", f"{message}: loader processes will end with SIGBUS", fix)
    if free < SHARED_MEMORY_WARN:
        return Check("shared memory", "warn", f"{message}: too little for large batches", fix)
    return Check("shared memory", "ok", message)


def check_disk(path: Path) -> Check:
    """Check the free disk space for runs and data below ``path``, and for temporary files."""
    free, place = min((shutil.disk_usage(place).free, place) for place in (path, Path(tempfile.gettempdir())))
    message = f"{_size(free)} free at {place}"
    fix = f"df -h {place}: free some space" + (", or point TMPDIR elsewhere" if place != path else "")
    if free < DISK_FAIL:
        return Check("disk", "fail", message, fix)
    return Check("disk", "warn", message, fix) if free < DISK_WARN else Check("disk", "ok", message)


def check_open_files() -> Check:
    """Check the limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES_WARN:
        return Check(
            "open files", "warn", f"at most {soft}: loader processes may run out", f"ulimit -n {max(hard, soft)}"
        )
    return Check("open files", "ok", f"at most {soft}")


def check_threads() -> Check:
    """Check that the threads of a rank do not exceed the cores."""
    cores, threads = available_cores(), os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        return Check("threads", "ok", f"{cores} cores; each rank gets its share of them")
    if not threads.isdecimal() or int(threads) > cores:
        message = f"OMP_NUM_THREADS={threads} on {cores} cores: more threads than cores slow each other down"
        return Check("threads", "warn", message, "unset OMP_NUM_THREADS")
    return Check("threads", "ok", f"OMP_NUM_THREADS={threads} for each rank, on {cores} cores")


def check_large_pages() -> Check:
    """Report whether tables and search vectors get large pages, in which a CPU reads them faster."""
    own, shared = large_pages_setting(), large_pages_setting("shmem_enabled")
    if own is None:
        return Check("large pages", "ok", "this system has none: a CPU reads tables in small pages")
    if own == "never":
        fix = f"echo madvise | sudo tee {SETTINGS / 'enabled'}"
        return Check("large pages", "warn", "switched off: a CPU reads tables more slowly in small pages", fix)
    why = "no shmem_enabled" if shared is None else f"shmem_enabled: {shared}"
    of_shared = f"are in small ones ({why}), and each process reads a copy in large ones if memory allows"
    if shared_memory_has_large_pages():
        of_shared = f"are too ({why})"
    message = f"tables on a CPU are in large pages ({own}); search vectors that loader processes share {of_shared}"
    return Check("large pages", "ok", message)


def check_placement(sysfs: Path = SYSFS) -> Check:
    """Report to which cores a training job would bind the rank of each GPU, and its loader processes."""
    gpus, allowed = nvidia_gpus(sysfs), frozenset(os.sched_getaffinity(0))
    if not gpus:
        return Check("placement", "ok", "no GPU: ranks are not bound to cores")
    places = []
    for gpu in gpus:
        cores, why = cores_near(gpu, allowed, sysfs)
        places.append(why if cores == allowed else f"{len(cores)} cores of {why}")
    workers = free_cores(available_cores() // len(gpus), 1)
    message = f"with a rank for each GPU: {'; '.join(dict.fromkeys(places))}; loader processes of a rank: {workers}"
    return Check("placement", "ok", message)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
