"""The benchmark of the stores of recent codes runs, with Redis where there is a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import code_store
from tests.semantic_ids.redis_server import BINARY, REASON, RedisServer


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "code_store.json"
    code_store.main(["--scale=200", "--repeats=3", f"--out={out}"])
    (store,) = json.loads(out.read_text())["stores"].values()
    assert store["segments"] == 10 * 150 and store["append"]["a_second"] > 0
    rates = [run["append"]["a_second"] for run in store["runs"]]
    assert len(rates) == 3 and store["append"]["a_second"] == sorted(rates)[1]
    assert "appends/s" in capsys.readouterr().out


@pytest.mark.skipif(BINARY is None, reason=REASON)
def test_a_small_run_with_redis(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="needs the package redis: pip install 'limelight[redis]'")
    server, out = RedisServer(tmp_path), tmp_path / "code_store.json"
    code_store.main(["--scale=200", "--repeats=2", f"--redis={server.url}", f"--out={out}"])
    assert set(json.loads(out.read_text())["stores"]) == {"sqlite", "redis"}
    import redis

    client = redis.Redis(port=server.port)
    assert client.dbsize() == 0, "nothing of the benchmark stays"
    client.set("users", "1")
    with pytest.raises(SystemExit, match="not empty"):
        code_store.main(["--scale=200", f"--redis={server.url}"])
    server.kill()
