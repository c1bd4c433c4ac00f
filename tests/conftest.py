"""Fixtures and markers of all tests."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.disk_syncs import leave_out_syncs
from tests.nursery import Ended, Nursery, NurseryProcess
from tests.paths import ROOT
from tests.s3 import Bucket, make_bucket, server_environment
from trainer.runtime.cores import available_cores

# Several test processes share the cores; torch reads the variable when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts a suite in the background with ctrl-C ignored, which the commands of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A deadline for one example would measure the machine, which may have other work to do.
hypothesis.settings.register_profile("limelight", deadline=None)
hypothesis.settings.load_profile("limelight")

leave_out_syncs()


@pytest.fixture(autouse=True, scope="session")
def messages_on_the_terminal() -> None:
    """Print log messages, as every command does."""
    from trainer.console.run_log import start_log

    start_log()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests marked slow as well")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one test process more than there are cores: tests of several ranks and of streams wait now and then."""
    return available_cores() + 1


LONG_FIRST = (
    *("tests/distributed", "tests/faults", "tests/semantic_ids", "tests/llm", "tests/benchmarks", "tests/stream"),
    *("tests/ranking", "tests/serving", "tests/launch", "tests/comment_staytime", "tests/engine", "tests/test_"),
)
"""Folders whose modules take longest; started first, so that the test processes end at about the same time."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((at for at, folder in enumerate(LONG_FIRST) if item.nodeid.startswith(folder)), len(LONG_FIRST))

    items.sort(key=place)
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


def pytest_collection_finish() -> None:
    """Spare later collections of garbage the visit of every imported object."""
    gc.freeze()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def real_kuairand() -> Path:
    """Return the folder of KuaiRand-Pure; skip the test if this machine does not have it."""
    folder = Path(os.environ.get("LIMELIGHT_KUAIRAND", ROOT.parent / "shared" / "data" / "kuairand-pure"))
    if not folder.is_dir():
        pytest.skip("no KuaiRand-Pure on this machine: set LIMELIGHT_KUAIRAND to its folder")
    return folder


SHARED_NURSERY = pytest.StashKey[NurseryProcess]()
"""Nursery of all test processes of a run."""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a test process where the nursery is that all of them share."""
    if SHARED_NURSERY not in node.config.stash:
        node.config.stash[SHARED_NURSERY] = NurseryProcess()
    shared = node.config.stash[SHARED_NURSERY]
    node.workerinput["nursery"] = (shared.address, shared.can_mount)


def pytest_unconfigure(config: pytest.Config) -> None:
    shared = config.stash.get(SHARED_NURSERY, None)
    if shared is not None:
        shared.close()


RunRanks = Callable[..., str]


@pytest.fixture(scope="session")
def nursery(request: pytest.FixtureRequest) -> Iterator[Nursery]:
    """Yield a process that has imported the slow modules, and forks the processes of tests."""
    shared = getattr(request.config, "workerinput", {}).get("nursery", ())
    with Nursery(*shared) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def run_ranks(nursery: Nursery) -> RunRanks:
    """Return ``run_ranks(module, *arguments, ranks=2, timeout=600, environment=None, expect=0) -> stdout``.

    Each rank is a process with one thread on the CPU, in the repository's root. Another exit status than ``expect``
    fails the test, with the end of the ranks' output.
    """

    def run(
        module: str,
        *arguments: object,
        ranks: int = 2,
        timeout: float = 600,
        environment: Mapping[str, str] | None = None,
        expect: int = 0,
    ) -> str:
        ended = nursery.run(module, arguments, ranks=ranks, environment=environment, timeout=timeout)
        if ended.status != expect:
            pytest.fail(
                f"{module} on {ranks} ranks: exit status {ended.status}\n{ended.stdout[-4000:]}\n{ended.stderr[-8000:]}"
            )
        return ended.stdout

    return run


Limelight = Callable[..., Ended]


@pytest.fixture(scope="session")
def limelight(nursery: Nursery) -> Limelight:
    """Return ``limelight(*arguments, expect=0) -> Ended``, which runs the command in the repository's root.

    The command is a process of its own. Another exit status than ``expect`` fails the test.
    """

    def run(*arguments: object, expect: int = 0) -> Ended:
        ended = nursery.run("launch.cli.main", arguments)
        if ended.status != expect:
            pytest.fail(f"exit status {ended.status}\n{ended.stdout[-4000:]}\n{ended.stderr[-8000:]}")
        return ended

    return run


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Yield the port of a local S3 server; skip the test if moto or s3fs is not installed."""
    for package in ("s3fs", "moto.server"):
        pytest.importorskip(package, reason="no local S3 server: pip install s3fs 'moto[s3]' flask flask-cors")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def bucket(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Return a new bucket of the local S3 server, which this process finds by its environment."""
    environment = server_environment(s3_port)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return make_bucket(environment)
