"""Run all checks and print their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from launch.doctor.check import Check
from launch.doctor.host import (
    check_collectives,
    check_compiler,
    check_disk,
    check_large_pages,
    check_open_files,
    check_placement,
    check_port,
    check_shared_memory,
    check_threads,
)
from launch.doctor.packages import (
    check_accelerator,
    check_lookup,
    check_loops,
    check_pins,
    check_python,
    check_triple,
    installed_versions,
    pinned_versions,
)
from launch.machine import has_nvidia_driver, nvidia_driver_version
from trainer.console.exit_status import CHECK_FAILED_STATUS


def all_checks() -> Iterator[Check]:
    """Yield the result of every check as soon as it is done. The lookup and the collectives are slow."""
    installed = installed_versions()
    yield check_python()
    yield check_pins(installed, pinned_versions())
    yield check_triple(installed)
    lookup, seen = check_lookup()
    yield lookup
    if seen:
        gpus = seen["devices"]
        driver = has_nvidia_driver()
        version = nvidia_driver_version() if driver else None
        yield check_accelerator(seen["cuda_build"], gpus, "fbgemm-gpu" in installed, driver, version)
        yield check_loops(seen["loops"])
        yield check_collectives("gloo", 2)
        if gpus:
            yield check_collectives("nccl", min(len(gpus), 2))
    yield check_compiler()
    yield check_port()
    yield check_shared_memory()
    yield check_disk(Path.cwd())
    yield check_open_files()
    yield check_threads()
    yield check_large_pages()
    yield check_placement()


def examine(*, as_json: bool) -> int:
    """Print all checks, a line for each as it is done or one JSON object at the end. Returns the exit status."""
    checks = []
    for check in all_checks():
        checks.append(check)
        if not as_json:
            print(f"{check.status:<5} {check.name:<24} {check.message}", flush=True)
            if check.fix:
                print(f"{'':<30} -> {check.fix}", flush=True)
    failures = sum(check.status == "fail" for check in checks)
    warnings = sum(check.status == "warn" for check in checks)
    if as_json:
        print(json.dumps({"ok": failures == 0, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        print(f"{len(checks)} checks: {failures} failed, {warnings} warned")
    return CHECK_FAILED_STATUS if failures else 0
