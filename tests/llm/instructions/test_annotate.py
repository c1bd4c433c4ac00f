"""Tests of asking a larger model: a local server that answers, refuses, sends nonsense, hangs, or is cut off."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cli.data_instructions import KEY_VARIABLE
from launch.cli.main import main
from tests.full_disk import files_of_at_most
from tests.nursery import Nursery
from tests.paths import ROOT
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.llm.instructions import annotate
from trainer.llm.instructions.annotate import (
    MAX_REFUSALS,
    PROMPTS,
    Annotator,
    AnswerCounts,
    parse_answer,
    rejected_file,
    segment_json,
)
from trainer.llm.instructions.annotations import DESCRIPTION_KEYS, AnnotationFile
from trainer.llm.instructions.chat_endpoint import MAX_ANSWER_BYTES, ChatEndpoint
from trainer.llm.instructions.segments import SegmentContext, SegmentTexts
from trainer.llm.models.prompt_templates import Template

TEMPLATES = ROOT / "configs/templates"
TEMPLATE = Template.read(TEMPLATES / "annotate.txt", PROMPTS)
DESCRIPTION = {key: f"the {key}" for key in DESCRIPTION_KEYS}
QUESTIONS = [{"question": "What is said?", "answer": "A number."}, {"question": "Why?", "answer": "To test."}]
ROOMS = 6
CONTEXT = SegmentContext(7, 3, 0, "Monday", "a host", "a show", "", "hello", (), ())

Reply = tuple[int, Any]
"""Status, and text of the answer or bytes of the whole response."""


class Served:
    """A server and what it was asked: ``asked`` counts the requests by the speech of the segment and the kind."""

    def __init__(self, reply: Callable[[str, str], Reply]) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply, self.release = reply, threading.Event()
        self.open = self.most_open = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    served: ClassVar[Served]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = request["messages"][0]["content"]
        prompt = content if isinstance(content, str) else content[0]["text"]
        kind = "questions" if "Write 10 questions" in prompt else "description"
        segment = json.loads(next(line for line in prompt.splitlines() if line.startswith('{"time"')))
        with self.served.lock:
            self.served.asked[segment["speech"], kind] += 1
            self.served.requests.append({"path": self.path, **request})
            self.served.headers.append(dict(self.headers))
            self.served.open += 1
            self.served.most_open = max(self.served.most_open, self.served.open)
        try:
            status, reply = self.served.reply(segment["speech"], kind)
        finally:
            with self.served.lock:
                self.served.open -= 1
        if isinstance(reply, str):
            choice = {"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
            reply = json.dumps({"choices": [choice]}).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)
        except OSError:
            # the client has given up, which is what some tests are about
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


Serve = Callable[[Callable[[str, str], Reply]], tuple[str, Served]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Yield a function that starts a server and returns its URL and what it was asked."""
    started: list[tuple[ThreadingHTTPServer, Served]] = []

    def start(reply: Callable[[str, str], Reply]) -> tuple[str, Served]:
        served = Served(reply)
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"served": served}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        started.append((server, served))
        return f"http://127.0.0.1:{server.server_port}/v1", served

    yield start
    for server, served in started:
        served.release.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of rooms with two segments each, three rooms before the border and three after it."""
    path = tmp_path_factory.mktemp("asked") / "rooms"
    (path / "texts").mkdir(parents=True)
    rows = [
        {"item_id": room, "segment": at, "start_ms": 86_400_000 * room + 30_000 * at, "text": f"number {room}-{at}"}
        for room in range(ROOMS)
        for at in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "texts/segments.parquet")
    spec = DatasetSpec("rooms", "", "", 1, "UTC", ("click",), {"click": ("live",)}, ("live",))
    (path / "dataset.json").write_text(spec.to_json())
    return path


@pytest.fixture
def segments(dataset: Path) -> SegmentTexts:
    return SegmentTexts(dataset, "UTC", comments=3, characters=100)


def good(speech: str, kind: str) -> Reply:
    return 200, json.dumps(QUESTIONS if kind == "questions" else DESCRIPTION)


def ask(url: str, file: Path, segments: SegmentTexts, rows: int = 4, **changes: Any) -> AnswerCounts:
    settings = {"timeout_seconds": 60.0, "retries": 3, "backoff_seconds": 0.0, **changes}
    endpoint = ChatEndpoint(f"{url}/chat/completions", "large", **settings)
    return Annotator(file, endpoint, TEMPLATE, concurrency=3, quiet=True).annotate(segments, np.arange(rows))


def test_every_segment_is_asked_for_both_kinds_once(serve: Serve, segments: SegmentTexts, tmp_path: Path) -> None:
    url, served = serve(good)
    file = tmp_path / "a.jsonl"
    assert ask(url, file, segments, key="secret") == AnswerCounts(earlier=0, good=8)
    assert set(served.asked.values()) == {1} and len(served.asked) == 8 and served.most_open <= 3
    assert {one["path"] for one in served.requests} == {"/v1/chat/completions"}
    assert {one["model"] for one in served.requests} == {"large"}
    assert {one["Authorization"] for one in served.headers} == {"Bearer secret"}
    stored = AnnotationFile(file)
    assert [len(stored.index[kind].ids) for kind in ("questions", "description")] == [4, 4]
    (first,) = stored.read(stored.index["description"].offset[:1])
    assert first.description == DESCRIPTION
    assert not rejected_file(file).exists()
    # the same command again, with more segments
    assert ask(url, file, segments, rows=5) == AnswerCounts(earlier=8, good=2)
    assert set(served.asked.values()) == {1} and len(served.asked) == 10


def test_requests_are_made_twice_as_many_as_are_asked_at_once_ahead_of_the_stored_answers(
    serve: Serve, segments: SegmentTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, stored, ahead = 0, 0, list[int]()
    context, add = segments.context, annotate._AnswerStore.add

    def count(row: int) -> SegmentContext:
        nonlocal made
        made += 1
        return context(row)

    def store(self: Any, answers: Any) -> str:
        nonlocal stored
        some = list(answers)
        ahead.append(made - stored)
        stored += len(some)
        return add(self, some)

    monkeypatch.setattr(segments, "context", count)
    monkeypatch.setattr(annotate._AnswerStore, "add", store)
    url, _ = serve(good)
    assert ask(url, tmp_path / "a.jsonl", segments, rows=12).good == 24
    # Nothing is stored before all of the first requests are made.
    assert ahead[0] == max(ahead) == 2 * 3 and stored == made == 24


@pytest.mark.parametrize("name", ["a.jsonl", "a.rejected.jsonl"])
def test_a_fifo_is_no_file_of_annotations(name: str, serve: Serve, segments: SegmentTexts, tmp_path: Path) -> None:
    url, served = serve(good)
    os.mkfifo(tmp_path / name)
    # Without a reader, an opening for appending would never end; with one, its end would be seen.
    reader = os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(UserError, match=f"{name}: not a regular file but a FIFO"):
            ask(url, tmp_path / "a.jsonl", segments, rows=1)
        ends = select.poll()
        ends.register(reader)
        assert ends.poll(0) == []
    finally:
        os.close(reader)
    assert not served.asked


def test_an_answer_that_cannot_be_used_is_kept_with_its_reason_and_not_asked_again(
    serve: Serve, segments: SegmentTexts, tmp_path: Path
) -> None:
    replies: dict[str, Reply] = {
        "number 0-0": (200, "I cannot see anything."),
        "number 0-1": (200, b"<html>"),
        "number 1-0": (200, '{"content": "x"} [{"question": "Why?"}]'),
        "number 1-1": (
            200,
            json.dumps({"choices": [{"message": {"content": "[{"}, "finish_reason": "length"}]}).encode(),
        ),
        "number 2-0": (422, b'{"error": {"message": "too long"}}'),
        "number 2-1": (200, b" " * (MAX_ANSWER_BYTES + 1)),
    }
    url, served = serve(lambda speech, kind: replies.get(speech, good(speech, kind)))
    file = tmp_path / "a.jsonl"
    counts = ask(url, file, segments, rows=8)
    assert (counts.good, counts.malformed) == (4, 12)
    kept = [json.loads(line) for line in rejected_file(file).read_text().splitlines()]
    reasons = {(one["item_id"], one["segment"], one["kind"]): one["reason"] for one in kept}
    assert len(reasons) == 12
    assert reasons[0, 0, "questions"] == "the answer has no JSON that begins with ["
    assert reasons[0, 1, "description"] == "the response is no chat completion"
    assert reasons[1, 0, "questions"].startswith("question 1: answer is missing")
    assert reasons[1, 0, "description"].startswith("description: character is missing")
    assert reasons[1, 1, "questions"] == "the answer was cut by the endpoint's limit of tokens"
    assert reasons[2, 0, "questions"] == "HTTP 422: too long"
    assert "more than 4,194,304 bytes" in reasons[2, 1, "description"]
    assert next(one for one in kept if one["segment"] == 0 == one["item_id"])["answer"] == "I cannot see anything."
    assert ask(url, file, segments, rows=8) == AnswerCounts(earlier=16)
    assert set(served.asked.values()) == {1}


def test_a_busy_server_is_asked_again(
    serve: Serve, segments: SegmentTexts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: Counter[tuple[str, str]] = Counter()

    def reply(speech: str, kind: str) -> Reply:
        seen[speech, kind] += 1
        return {1: (429, b"slow down"), 2: (503, b"")}.get(seen[speech, kind], good(speech, kind))

    url, served = serve(reply)
    assert ask(url, tmp_path / "a.jsonl", segments, rows=2) == AnswerCounts(good=4)
    assert set(served.asked.values()) == {3}
    seen.clear()
    endpoint = ChatEndpoint(f"{url}/chat/completions", "large", retries=3, backoff_seconds=0.0)
    Annotator(tmp_path / "b.jsonl", endpoint, TEMPLATE, concurrency=1).annotate(segments, np.arange(2))
    printed = capsys.readouterr().out
    assert "HTTP 429: slow down; asking again" in printed and "asking large: 4/4 answers (100 %)" in printed
    assert "ETA" in printed


def test_a_server_that_stays_down_ends_the_run_and_what_has_come_is_kept(
    serve: Serve, segments: SegmentTexts, tmp_path: Path
) -> None:
    up = {"number 0-0", "number 0-1"}
    url, _ = serve(lambda speech, kind: good(speech, kind) if speech in up else (500, b"out of order"))
    file = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"HTTP 500: out of order, after 2 tries; \d new answers are in .*a\.jsonl"):
        ask(url, file, segments, retries=1)
    before = {kind: len(index.ids) for kind, index in AnnotationFile(file).index.items()} if file.exists() else {}
    up |= {"number 1-0", "number 1-1"}
    counts = ask(url, file, segments)
    assert counts.earlier == sum(before.values()) and counts.earlier + counts.good == 8


def test_an_answer_that_breaks_off_is_asked_for_again(serve: Serve, segments: SegmentTexts, tmp_path: Path) -> None:
    def reply(speech: str, kind: str) -> Reply:
        return good(speech, kind) if served.asked[speech, kind] > 1 else (200, Broken(b'{"choices": ['))

    url, served = serve(reply)
    assert ask(url, tmp_path / "a.jsonl", segments, rows=1) == AnswerCounts(good=2)
    assert set(served.asked.values()) == {2}


class Broken(bytes):
    """A response that ends before the length that its header says."""

    def __len__(self) -> int:
        return super().__len__() + 100


@pytest.mark.parametrize("status", [301, 401, 404])
def test_a_wrong_key_or_address_ends_at_once_and_the_key_is_not_shown(
    status: int, serve: Serve, segments: SegmentTexts, tmp_path: Path
) -> None:
    url, served = serve(lambda speech, kind: (status, b'{"error": {"message": "bad key secret"}}'))
    with pytest.raises(UserError, match=rf"HTTP {status}: bad key \*\*\*; 0 new answers") as refused:
        ask(url, tmp_path / "a.jsonl", segments, key="secret")
    assert "secret" not in str(refused.value) and set(served.asked.values()) == {1}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [200, 401, 500])
def test_the_key_is_not_shown_where_a_server_repeats_it_at_a_cut(
    status: int, serve: Serve, segments: SegmentTexts, tmp_path: Path
) -> None:
    key = "sk-" + "very/secret-" * 5
    padding, done = "x" * (2000 - 30 if status == 200 else 150), "questions" if status == 200 else ""
    escaped = json.dumps({"error": {"message": f"{padding} {key}"}}).replace("/", "\\/")
    for body in (escaped, f"{padding} {key}"):
        reply = (status, body.encode())
        url, _ = serve(lambda speech, kind, reply=reply: good(speech, kind) if kind == "questions" == done else reply)
        file = tmp_path / "a.jsonl"
        message = ""
        try:
            ask(url, file, segments, rows=1, key=key, retries=0)
        except UserError as error:
            message = str(error)
        assert (status == 200) == (message == "")
        stored = rejected_file(file).read_text() if status == 200 else ""
        assert "***" in message + stored and "secret" not in message + stored
        rejected_file(file).unlink(missing_ok=True)


def test_a_server_that_refuses_everything_is_a_mistake_of_the_settings(
    serve: Serve, segments: SegmentTexts, tmp_path: Path
) -> None:
    url, served = serve(lambda speech, kind: (400, b'{"error": "no such model"}'))
    for rows in (2, 12):
        with pytest.raises(UserError, match=r"refuses every request \(HTTP 400: no such model\)"):
            ask(url, tmp_path / "a.jsonl", segments, rows=rows)
        assert list(tmp_path.iterdir()) == [], "what was refused is asked again"
    assert sum(served.asked.values()) <= 4 + MAX_REFUSALS + 1 + 2 * 3
    served.reply = good
    assert ask(url, tmp_path / "a.jsonl", segments, rows=2).good == 4
    served.reply = lambda speech, kind: (400, b"")
    assert ask(url, tmp_path / "a.jsonl", segments, rows=3) == AnswerCounts(earlier=4, malformed=2)


def test_a_server_of_something_else_is_a_mistake_of_the_settings(
    serve: Serve, segments: SegmentTexts, tmp_path: Path
) -> None:
    """Such as one that answers every path with its start page: stored, nothing would be asked again."""
    url, served = serve(lambda speech, kind: (200, b"<html>welcome</html>"))
    for rows in (2, 12):
        with pytest.raises(UserError, match=r"refuses every request \(the response is no chat completion\)"):
            ask(url, tmp_path / "a.jsonl", segments, rows=rows)
        assert list(tmp_path.iterdir()) == []
    served.reply = good
    assert ask(url, tmp_path / "a.jsonl", segments, rows=2) == AnswerCounts(good=4)


def test_an_error_of_the_client_is_no_answer_and_is_asked_again(
    serve: Serve, segments: SegmentTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise UnicodeError("label empty\nor too long")

    url, _ = serve(good)
    with monkeypatch.context() as patched:
        patched.setattr("socket.create_connection", broken)
        with pytest.raises(UserError, match="label empty or too long; 0 new answers"):
            ask(url, tmp_path / "a.jsonl", segments, rows=1)
    assert list(tmp_path.iterdir()) == []
    assert ask(url, tmp_path / "a.jsonl", segments, rows=1) == AnswerCounts(good=2)


@pytest.mark.parametrize("drips", [False, True], ids=["silent", "a byte at a time"])
def test_a_server_that_hangs_is_left_after_the_timeout(drips: bool, segments: SegmentTexts, tmp_path: Path) -> None:
    import socket

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang() -> None:
            open_ones = []
            while not ended.is_set():
                try:
                    open_ones.append(listener.accept()[0])
                except OSError:
                    return
                threading.Thread(target=drip, args=(open_ones[-1],), daemon=True).start()

        def drip(connection: socket.socket) -> None:
            while drips and not ended.wait(0.01):
                try:
                    connection.sendall(b"H")
                except OSError:
                    return

        threading.Thread(target=hang, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match=r"no answer in 0\.2 s, after 2 tries|stopped|status line"):
            ask(url, tmp_path / "a.jsonl", segments, rows=1, timeout_seconds=0.2, retries=1)
        ended.set()


def test_a_port_without_a_server_is_named(segments: SegmentTexts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Connection refused, after 1 tries"):
        # nothing can listen on port 0
        ask("http://127.0.0.1:0", tmp_path / "a.jsonl", segments, retries=0)


def test_a_killed_run_continues_and_asks_nothing_twice_that_was_stored(
    serve: Serve, nursery: Nursery, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    answered: Counter[tuple[str, str]] = Counter()

    def some(speech: str, kind: str) -> Reply:
        with served.lock:
            answered[speech, kind] += 1
            hold = len(answered) > 9
        if hold:
            served.release.wait(60)
        return good(speech, kind) if speech != "number 0-1" else (200, "no")

    url, served = serve(some)
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    words = ["data", "instructions", str(dataset), str(out), "--segments", "--evaluate-from", "1970-01-04"]
    words += ["--annotations", str(file), "--annotate", url, "--model", "large", "--concurrency", "2"]
    words += ["--templates", str(TEMPLATES)]
    process = nursery.start("launch.cli.main", words, 0, {KEY_VARIABLE: "secret"}, tmp_path / "log")
    while len(answered) < 11 or not file.exists():
        assert nursery.wait(process, 0.01) is None, (tmp_path / "log").read_text()
    os.kill(process, signal.SIGKILL)
    nursery.wait(process, 60)
    served.release.set()
    stored = file.read_bytes()
    assert not out.exists() and stored.endswith(b"\n") and len(stored.splitlines()) >= 5
    # killed in the middle of a write: the rest of a line is removed
    file.write_bytes(stored + b'{"item_id": 3, "segm')
    before = {
        (f"number {one // (1 << 16)}-{one % (1 << 16)}", kind)
        for kind, index in AnnotationFile(stored_copy(tmp_path, stored)).index.items()
        for one in index.ids.tolist()
    }
    first = Counter(answered)
    assert main(words) == 0
    assert {one["Authorization"] for one in served.headers} == {"Bearer secret"}
    assert not any(b"secret" in path.read_bytes() for path in (*out.iterdir(), file, tmp_path / "log"))
    twice = {key for key, count in answered.items() if count > 1}
    assert not twice & before and all(first[key] == 1 for key in twice)
    assert len(answered) == 2 * 2 * ROOMS and file.read_bytes().startswith(stored)
    assert len((tmp_path / "a.rejected.jsonl").read_text().splitlines()) == 2
    assert json.loads((out / "manifest.json").read_text())["annotations"]["lines"] == 2 * 2 * ROOMS - 2
    assert main([*words[:3], str(tmp_path / "again"), *words[4:]]) == 0
    assert sum(answered.values()) == len(answered) + len(twice), "a finished file is not asked for again"
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (out / "train.jsonl").read_bytes()


def stored_copy(folder: Path, content: bytes) -> Path:
    copy = folder / "copy.jsonl"
    copy.write_bytes(content)
    return copy


def test_a_last_line_without_an_end_is_kept_if_it_is_whole(
    serve: Serve, segments: SegmentTexts, tmp_path: Path
) -> None:
    url, _ = serve(good)
    file = tmp_path / "a.jsonl"
    own = {"item_id": 0, "segment": 0, "questions": [{"question": "Mine?", "answer": "Yes."}]}
    file.write_text(json.dumps(own))
    assert ask(url, file, segments, rows=1) == AnswerCounts(earlier=1, good=1)
    assert file.read_text().startswith(json.dumps(own) + "\n") and len(file.read_text().splitlines()) == 2
    file.write_text('{"item_id": 0, "segment": "one"}')
    with pytest.raises(UserError, match=r"a\.jsonl:1: segment is 'one'"):
        ask(url, file, segments, rows=1)
    assert file.read_text() == '{"item_id": 0, "segment": "one"}\n', "a person's line is not removed"


@pytest.mark.parametrize("content", [b"notes\nmore notes", b'{\n "hidden": 8\n}', b"\x93NUMPY\x01\x00v", b"[1, 2]"])
def test_another_file_that_was_named_by_mistake_is_refused_and_stays(
    content: bytes, serve: Serve, segments: SegmentTexts, tmp_path: Path
) -> None:
    url, served = serve(good)
    file = tmp_path / "model.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.jsonl:1: "):
        ask(url, file, segments, rows=1)
    assert file.read_bytes() == content and not served.asked


@pytest.mark.parametrize("torn", [b'{"it', b'{"item_id": 0, "seg', b"\0" * 9, b'{"item_id": 0, "se\0\0'])
def test_the_beginning_of_a_line_that_a_killed_run_has_left_is_removed(
    torn: bytes, serve: Serve, segments: SegmentTexts, tmp_path: Path
) -> None:
    url, _ = serve(good)
    file = tmp_path / "a.jsonl"
    ask(url, file, segments, rows=1)
    whole = file.read_bytes()
    file.write_bytes(whole + torn)
    assert ask(url, file, segments, rows=1) == AnswerCounts(earlier=2) and file.read_bytes() == whole


def test_two_processes_cannot_write_one_file(serve: Serve, segments: SegmentTexts, tmp_path: Path) -> None:
    import fcntl

    url, _ = serve(good)
    with (tmp_path / "a.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes annotations to it"):
            ask(url, tmp_path / "a.jsonl", segments)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://host/v1", "not a URL of http or https"),
        ("host:8000", "not a URL of http or https"),
        ("http://host:port/v1", "not a URL"),
        ("http://me:word@host/v1", "a URL with a user name"),
        ("http://host/v1?key=1", "a URL with a user name, a query"),
        ("http://host name/v1", "not a URL of http or https"),
        ("http://host..net/v1", "not a URL (UnicodeError: "),
        (f"http://{'h' * 64}.net/v1", "not a URL (UnicodeError: "),
        ("http://me:word@host:port/v1", "--annotate: not a URL; write"),
        ("http://me:word/@host/v1", "--annotate: not a URL; write"),
        ("ftp://me:word@host/v1", "--annotate: not a URL of http or https"),
    ],
)
def test_a_url_that_cannot_be_asked_is_refused_before_any_work(
    url: str, told: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "instructions", str(dataset), str(tmp_path / "out"), "--segments", "--evaluate-from", "1970-01-04"]
    words += ["--annotations", str(tmp_path / "a.jsonl"), "--model", "m", "--annotate", url]
    assert main([*words, "--templates", str(TEMPLATES)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and "word" not in line.replace("words", "") and list(tmp_path.iterdir()) == []


def test_a_base_url_is_completed() -> None:
    for url, full in (
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("https://h/x/chat/completions", "https://h/x/chat/completions"),
    ):
        assert ChatEndpoint.of(url, "m", "", timeout_seconds=1, retries=0).url == full
    with pytest.raises(UserError, match="the API key in the environment has blanks"):
        ChatEndpoint.of("http://h", "m", "a\nb", timeout_seconds=1, retries=0)
    assert KEY_VARIABLE == "LIMELIGHT_ANNOTATE_KEY"


@given(st.text(max_size=40), st.lists(st.text(max_size=10), max_size=2))
def test_a_prompt_has_a_user_s_text_as_json_without_control_tokens(speech: str, comments: list[str]) -> None:
    context = SegmentContext(7, 3, 0, "Monday", "<s>[INST]", "r", "", f"<|im_start|>{speech}", tuple(comments), ())
    text = segment_json(context)
    assert "<" not in text and "[INST]" not in text and "\n" not in text
    assert json.loads(text)["speech"] == context.speech and json.loads(text).get("comments", []) == comments


@given(st.text(max_size=60) | st.sampled_from(["[" * 5_000, "{" * 5_000, '{"a":' * 2_000, "[1]", "[]", "{}"]))
def test_any_text_is_an_answer_or_has_a_reason(text: str) -> None:
    for kind in ("questions", "description"):
        try:
            annotation = parse_answer(CONTEXT, kind, text)
        except (ValueError, RecursionError) as error:
            assert str(error)
        else:
            assert annotation.questions or annotation.description


def test_json_is_found_in_what_models_write_around_it() -> None:
    fenced = "Here you are [as asked]:\n```json\n" + json.dumps(QUESTIONS) + "\n```"
    assert parse_answer(CONTEXT, "questions", fenced).questions == (
        ("What is said?", "A number."),
        ("Why?", "To test."),
    )
    spoken = {key.replace("_", " ").capitalize(): [value, "more"] for key, value in DESCRIPTION.items()}
    described = parse_answer(CONTEXT, "description", f"Sure! {json.dumps(spoken)} Anything else?").description
    assert described == {key: f"{value}; more" for key, value in DESCRIPTION.items()}


def test_pictures_at_urls_are_sent(serve: Serve, dataset: Path, segments: SegmentTexts, tmp_path: Path) -> None:
    url, served = serve(good)
    segments._frames = pa.array([["http://x/1.jpg", "local.jpg"]] * 12, pa.large_list(pa.large_string()))
    assert ask(url, tmp_path / "a.jsonl", segments, rows=1).good == 2
    for request in served.requests:
        text, *pictures = request["messages"][0]["content"]
        assert [one["image_url"]["url"] for one in pictures] == ["http://x/1.jpg"]
        assert text["type"] == "text" and '"frames": 2' in text["text"]


def test_a_full_disk_leaves_whole_lines(serve: Serve, segments: SegmentTexts, tmp_path: Path) -> None:
    url, _ = serve(good)
    file = tmp_path / "a.jsonl"
    ask(url, file, segments, rows=1)
    whole = file.read_bytes()
    with (
        files_of_at_most(len(whole) + 50),
        pytest.raises(UserError, match=r"a\.jsonl: cannot be written \(File too large\)"),
    ):
        ask(url, file, segments, rows=4)
    assert file.read_bytes() == whole
