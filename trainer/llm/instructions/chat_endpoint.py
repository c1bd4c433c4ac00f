"""Client of an OpenAI-compatible chat endpoint: one prompt, one answer, with a deadline and retries.

The standard library is enough for one kind of request, and an HTTP client would be a dependency of every installation.
The client follows no redirect, since that would carry the key to another host, and uses no proxy.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from trainer.console.errors import UserError, one_line

MAX_ANSWER_BYTES = 1 << 22
"""Largest response that is read."""

_REFUSED = frozenset((400, 413, 415, 422))
"""Statuses about one request, such as a prompt that is too long or that a filter stops."""
_AGAIN = frozenset((408, 409, 425, 429))
"""Statuses that ask to try again, beside all from 500 on."""
_LONGEST_WAIT_SECONDS = 60.0

STOPPED = "stopped"
"""Reason of a request that was given up because the run has stopped."""


class RequestRefused(Exception):
    """The endpoint refuses one request for good; the message is the reason."""


class UnusableAnswer(Exception):
    """An answer cannot be used; the message is the reason.

    Attributes:
        answer: text of the answer, empty if there is none.
    """

    def __init__(self, reason: str, answer: str = "") -> None:
        super().__init__(reason)
        self.answer = answer


class NoCompletion(UnusableAnswer):
    """A response is no chat completion, such as the page of another server."""


class EndpointDown(Exception):
    """The endpoint gives no answers: all tries failed, or it refuses every request. The message is the reason."""


class _TryAgain(Exception):
    """A try failed, and a later one may succeed.

    Args:
        reason: reason for messages.
        wait_seconds: time that the endpoint asks to wait.
    """

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class ChatEndpoint:
    """A chat endpoint; may be used by several threads at once.

    Attributes:
        url: URL of the completions, http or https.
        model: name of the model in the requests.
        key: API key; empty sends none.
        timeout_seconds: longest time of one try, from connecting to the last byte.
        retries: further tries after the first one.
        backoff_seconds: wait before the first retry. It doubles with each, up to a minute, and is varied at random.
    """

    url: str
    model: str
    key: str = ""
    timeout_seconds: float = 120.0
    retries: int = 6
    backoff_seconds: float = 1.0

    @staticmethod
    def of(url: str, model: str, key: str, *, timeout_seconds: float, retries: int) -> ChatEndpoint:
        """Return the endpoint at a URL; ``/v1/chat/completions`` is added where it is missing.

        Raises:
            UserError: the URL is not one of http or https with a host, it has a user name, or the key cannot be sent.
        """
        # A password or a key in a URL must not be shown, also if the URL is wrong.
        secret = "@" in url or "?" in url
        shown = "" if secret else f" {url!a}"
        try:
            parts = urlsplit(url)
            host, user, _ = parts.hostname, parts.username, parts.port
            url.encode("ascii")
            # A name with an empty or a too long part cannot be looked up.
            (host or "").encode("idna")
        except ValueError as error:
            reason = "" if secret else f" ({one_line(error):.80})"
            raise UserError(f"--annotate{shown}: not a URL{reason}; write http://HOST:PORT/v1") from None
        if parts.scheme not in ("http", "https") or not host or any(sign.isspace() for sign in url):
            raise UserError(f"--annotate{shown}: not a URL of http or https; write such as http://HOST:PORT/v1")
        if user is not None or parts.query or parts.fragment:
            raise UserError(
                "--annotate: a URL with a user name, a query or a fragment is not accepted; the key is read from the "
                "environment"
            )
        if not all(32 < ord(sign) < 127 for sign in key):
            raise UserError("the API key in the environment has blanks or characters that no header can carry")
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions" if path else "/v1/chat/completions"
        return ChatEndpoint(
            f"{parts.scheme}://{parts.netloc}{path}", model, key, timeout_seconds=timeout_seconds, retries=retries
        )

    def ask(
        self, prompt: str, images: Sequence[str], stop: threading.Event, notice: Callable[[str], None] | None = None
    ) -> str:
        """Return the answer to a prompt with pictures at URLs.

        Args:
            prompt: text of the request.
            images: URLs of pictures.
            stop: set to give up between two tries.
            notice: called with the reason before a further try.

        Raises:
            RequestRefused: the endpoint refuses this request.
            UnusableAnswer: the response has no text, or it was cut by a limit of tokens.
            EndpointDown: every try failed, or no request can succeed.
        """
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": _content(prompt, images)}]})
        tries = 0
        while True:
            tries += 1
            try:
                return self._text(self._post(body.encode()))
            except _TryAgain as error:
                if tries > self.retries or stop.is_set():
                    raise EndpointDown(f"{self._hide(str(error))}, after {tries} tries") from None
                if notice is not None:
                    notice(self._hide(str(error)))
                wait = max(error.wait_seconds, self.backoff_seconds * 2 ** (tries - 1) * random.uniform(0.5, 1.0))
                if stop.wait(min(wait, _LONGEST_WAIT_SECONDS)):
                    raise EndpointDown(STOPPED) from None

    def _post(self, body: bytes) -> bytes:
        """Send one request and return the body of the response.

        Raises:
            _TryAgain, RequestRefused, EndpointDown: as the status or the failure of the connection says.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout_seconds)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        begun, late = time.monotonic(), threading.Event()
        timer = None
        try:
            connection.connect()
            # A timeout of a socket begins anew with each byte; only a clock of our own ends a server that sends slowly.
            left = max(0.0, self.timeout_seconds - (time.monotonic() - begun))
            timer = threading.Timer(left, _shut, (connection.sock, late))
            timer.daemon = True
            timer.start()
            connection.request("POST", parts.path, body, headers)
            response = connection.getresponse()
            content = response.read(MAX_ANSWER_BYTES + 1)
            if late.is_set():
                raise TimeoutError
            if response.length and len(content) <= MAX_ANSWER_BYTES:
                # a bounded read returns what came before the connection broke
                raise http.client.IncompleteRead(content, response.length)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise _TryAgain(f"no answer in {self.timeout_seconds:g} s") from None
            raise _TryAgain(self._hide(one_line(error))[:200]) from None
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()
        status = response.status
        if status == http.HTTPStatus.OK:
            if len(content) > MAX_ANSWER_BYTES:
                raise UnusableAnswer(f"has more than {MAX_ANSWER_BYTES:,} bytes")
            return content
        reason = self._hide(f"HTTP {status}{_reason(self._without_key(content))}")
        if status in _AGAIN or status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _TryAgain(reason, _retry_after(response.getheader("Retry-After")))
        if status in _REFUSED:
            raise RequestRefused(reason)
        raise EndpointDown(reason)

    def _hide(self, reason: str) -> str:
        """Return a reason without the key, which some servers repeat."""
        return reason.replace(self.key, "***") if self.key else reason

    def _without_key(self, content: bytes) -> bytes:
        """Return a response without the key, also as JSON may write it. It comes before any cut through the key."""
        for key in {self.key, json.dumps(self.key)[1:-1], self.key.replace("/", "\\/")} - {""}:
            content = content.replace(key.encode(), b"***")
        return content

    def _text(self, content: bytes) -> str:
        """Return the text of a response.

        Raises:
            NoCompletion: the response is none.
            UnusableAnswer: there is no text, or it was cut.
        """
        try:
            choice = json.loads(content)["choices"][0]
            text = choice["message"]["content"]
            ended = choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            shown = self._without_key(content)[:2000].decode(errors="replace")
            raise NoCompletion("the response is no chat completion", shown) from None
        if not isinstance(text, str) or not text.strip():
            raise UnusableAnswer("the answer has no text")
        if ended == "length":
            raise UnusableAnswer("the answer was cut by the endpoint's limit of tokens", text)
        return text


def _shut(connection: socket.socket, late: threading.Event) -> None:
    """End a connection, so that the thread that waits for it goes on."""
    late.set()
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # it has ended in the meantime
        return


def _content(prompt: str, images: Sequence[str]) -> Any:
    if not images:
        return prompt
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"type": "text", "text": prompt}, *pictures]


def _reason(content: bytes) -> str:
    """Return the message of an error response behind a colon; empty if it has none."""
    try:
        found = json.loads(content)
        error = found.get("error", found)
        message = error.get("message", "") if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        message = content.decode(errors="replace")
    line = " ".join(str(message).split())[:200]
    return f": {line}" if line else ""


def _retry_after(text: str | None) -> float:
    """Return the seconds that a header asks to wait; 0 without a number."""
    try:
        seconds = float(text or 0)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < float("inf") else 0.0
