"""Network namespaces of tests end with the process that made them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.hosts import TIMEOUTS
from tests.nursery import Nursery


def test_keepers_of_namespaces_end_with_their_client(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The socket of a client closes when the client is killed, and the keepers have nobody else who ends them."""
    shared = getattr(request.config, "workerinput", {}).get("nursery", ())
    out = tmp_path / "out"
    out.touch()
    with Nursery(*shared) as client:
        if not client.can_mount:
            pytest.skip("no namespaces on this machine")
        keeper = client.start("tests.distributed.hosts", [], 0, {}, out)
        while not out.read_text().endswith("]\n"):
            if client.wait(keeper, 0.05) is not None:
                pytest.skip(out.read_text()[-200:])
        keepers = [psutil.Process(process) for process in json.loads(out.read_text().splitlines()[-1])]
        assert all(process.is_running() for process in keepers)
    deadline = time.monotonic() + TIMEOUTS
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in keepers):
        assert time.monotonic() < deadline, "a keeper outlives its client"
        time.sleep(0.01)
