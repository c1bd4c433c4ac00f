"""Fixtures and markers that tests of every folder share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.paths import ROOT

# Set before anything imports torch: several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def messages_on_the_terminal() -> None:
    """Show messages as every command does."""
    from trainer.console.run_log import start_log

    start_log()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        reason = pytest.mark.skip(reason="slow: run with --slow or `make test-all`")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(reason)
    if any("gpu" in item.keywords for item in items) and not _has_cuda():
        reason = pytest.mark.skip(reason="needs a CUDA device, this machine has none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(reason)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def real_kuairand() -> Path:
    """The folder of KuaiRand-Pure, wherever this machine has it."""
    folder = Path(os.environ.get("LIMELIGHT_KUAIRAND", ROOT.parent / "shared" / "data" / "kuairand-pure"))
    if not folder.is_dir():
        pytest.skip("no KuaiRand-Pure on this machine: set LIMELIGHT_KUAIRAND to its folder")
    return folder


RunRanks = Callable[..., str]


@pytest.fixture
def run_ranks() -> RunRanks:
    """``run_ranks(target, *arguments, ranks=2, timeout=180, environment=None, expect=0) -> stdout of all ranks``.

    ``target`` is a script (a Path) or a module (a dotted name); each rank is one process under torchrun with one
    thread and the CPU backend, in the repository's root. An exit status other than ``expect`` fails the test with the
    end of what the ranks wrote.
    """

    def run(
        target: Path | str,
        *arguments: object,
        ranks: int = 2,
        timeout: float = 180,
        environment: Mapping[str, str] | None = None,
        expect: int = 0,
    ) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(target)] if isinstance(target, Path) else ["-m", target]
        command += [str(argument) for argument in arguments]
        settings = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **(environment or {}),
        }
        # A session of its own, so that a timeout ends torchrun and its ranks together.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            stdout, stderr = process.communicate()
            pytest.fail(f"{target} on {ranks} ranks ran past {timeout:.0f} s\n{stdout[-4000:]}\n{stderr[-8000:]}")
        if process.returncode != expect:
            status = process.returncode
            pytest.fail(f"{target} on {ranks} ranks: exit status {status}\n{stdout[-4000:]}\n{stderr[-8000:]}")
        return stdout

    return run
