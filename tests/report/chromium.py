"""A headless Chromium, driven over the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """Return the path of a Chromium on this machine; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """A tab of a browser.

    Attributes:
        events: messages of the browser so far, such as requests and lines of the console.
    """

    def __init__(self, write: Callable[[bytes], object], read: Callable[[], bytes]) -> None:
        self.events: list[dict[str, Any]] = []
        self._write, self._read = write, read
        self._session, self._number = "", 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, file: Path, width: int, scheme: str) -> None:
        """Open a file in a window of a width, in the light or dark scheme."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self._read()))

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])


@contextmanager
def browser_tab(chromium: str, profile: Path) -> Iterator[Tab]:
    """Start a browser with a profile of its own, and yield a tab; the browser ends with the block."""
    from_us, to_us = os.pipe(), os.pipe()
    # The browser reads descriptor 3 and writes descriptor 4.
    command = (
        f'exec "$0" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --remote-debugging-pipe '
        f'--user-data-dir="$1" 3<&{from_us[0]} 4>&{to_us[1]}'
    )
    process = subprocess.Popen(
        ["bash", "-c", command, chromium, str(profile)],
        pass_fds=(from_us[0], to_us[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(from_us[0])
    os.close(to_us[1])
    received = bytearray()

    def read() -> bytes:
        while b"\0" not in received:
            chunk = os.read(to_us[0], 1 << 16)
            assert chunk, "the browser has ended"
            received.extend(chunk)
        message, _, rest = bytes(received).partition(b"\0")
        received[:] = rest
        return message

    try:
        yield Tab(lambda message: os.write(from_us[1], message), read)
    finally:
        process.kill()
        process.wait()
        os.close(from_us[1])
        os.close(to_us[0])
