"""Redis server of a test: a child process on a port of its own, without persistence."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

BINARY = shutil.which("redis-server")
REASON = "needs redis-server, which Debian has: apt-get install redis-server"


class RedisServer:
    """A server on 127.0.0.1.

    Attributes:
        url: address of its database 0.
        process: the server.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self._directory, self._options = directory, options
        self.url = ""
        # Another process may take a port between its choice and its use: the server then ends at once.
        for _ in range(20):
            if self.start(_free_port()):
                return
        raise RuntimeError("no redis-server could be started")

    def start(self, port: int) -> bool:
        """Start the server on a port; False if it ended instead of answering."""
        import redis

        assert BINARY is not None
        command = [BINARY, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(
            [*command, "--dir", str(self._directory), *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        client = redis.Redis(port=port)
        while self.process.poll() is None:
            try:
                # Another server may answer on this port.
                if client.ping() and client.info("server")["process_id"] == self.process.pid:
                    self.port, self.url = port, f"redis://127.0.0.1:{port}/0"
                    return True
            except redis.RedisError:
                pass
            time.sleep(0.02)
        return False

    def kill(self) -> None:
        """End the server at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _free_port() -> int:
    from launch.machine import free_port

    return free_port()
