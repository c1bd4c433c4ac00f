"""Asks a larger model for annotations of segments, and appends its answers to an annotation file.

Each segment is asked for twice: for questions with answers, and for a structured description (the two tasks of LARM).
An answer is a line of the file as soon as it is there, flushed to disk. Answers that cannot be used go to a second file
with their reason. The same command asks only what neither file has.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.console.errors import UserError, failure_reason, one_line
from trainer.console.progress import LINE_EVERY_SECONDS, Progress
from trainer.data.format.text_schema import SEGMENTS_PER_ITEM
from trainer.llm.instructions.annotations import (
    KINDS,
    MAX_ITEM,
    MAX_LINE_BYTES,
    Annotation,
    AnnotationFile,
    annotation_lines,
    check_description,
    check_questions,
    parse_annotation,
)
from trainer.llm.instructions.chat_endpoint import (
    STOPPED,
    ChatEndpoint,
    EndpointDown,
    NoCompletion,
    RequestRefused,
    UnusableAnswer,
)
from trainer.llm.instructions.segments import SegmentContext, SegmentTexts
from trainer.llm.models.prompt_templates import Template
from trainer.runtime.files import sync, write_fully
from trainer.runtime.stored_files import open_regular

logger = logging.getLogger(__name__)

PROMPTS: dict[str, frozenset[str]] = {
    "questions": frozenset({"segment", "number"}),
    "description": frozenset({"segment"}),
}
"""Sections of the template and their placeholders, by kind of annotation."""

QUESTIONS = 10
"""Questions that are asked for."""

MAX_REFUSALS = 20
"""Requests in a row that an endpoint may refuse, or answer with something else than a completion, before any was
answered; more are a mistake in the settings."""

_FIRST_BYTES = b'{"item_id": '
"""Beginning of each line that is written here."""
_KEPT_CHARACTERS = 4_000
_JSON_TRIES = 50

Asked = tuple[int, str]
"""Id of a segment and kind of annotation."""


@dataclass
class AnswerCounts:
    """Counts of the answers of one run.

    Attributes:
        earlier: answers that earlier runs have stored, good or not.
        good: answers that were appended.
        malformed: answers that could not be used, and requests that the endpoint refused.
    """

    earlier: int = 0
    good: int = 0
    malformed: int = 0


@dataclass(frozen=True)
class _Answer:
    """Outcome of one request: an annotation, a reason why there is none, or the end of the endpoint."""

    context: SegmentContext
    kind: str
    annotation: Annotation | None = None
    reason: str = ""
    text: str = ""
    refused: bool = False
    down: bool = False


class Annotator:
    """Asks an endpoint about segments and stores the answers.

    Args:
        file: annotation file, which is made if it does not exist.
        endpoint: endpoint of the larger model.
        template: template of the two prompts.
        concurrency: requests at the same time.
        quiet: show no progress.
    """

    def __init__(
        self, file: str | Path, endpoint: ChatEndpoint, template: Template, *, concurrency: int, quiet: bool = False
    ) -> None:
        self.file, self.rejected = Path(file), rejected_file(file)
        self._endpoint, self._template = endpoint, template
        self._concurrency, self._quiet = concurrency, quiet
        self._noticed = -LINE_EVERY_SECONDS

    def annotate(self, segments: SegmentTexts, rows: np.ndarray) -> AnswerCounts:
        """Ask about the segments at positions ``rows`` what was not asked yet, and append the answers.

        Raises:
            UserError: a file cannot be written or is not an annotation file, another process writes it, or the endpoint
                does not answer. Answers that have come are stored.
        """
        with _appending(self.file) as good, _appending(self.rejected) as bad:
            # A line without its end was not flushed before its writer was killed.
            _end_last_line(self.file, good, _is_annotation)
            _end_last_line(self.rejected, bad, _is_object)
            done = asked_before(self.file, self.rejected)
            wanted = [(int(row), kind) for row in rows for kind in KINDS]
            left = [(row, kind) for row, kind in wanted if (int(segments.ids[row]), kind) not in done]
            counts = AnswerCounts(earlier=len(wanted) - len(left))
            requests = ((segments.context(row), kind) for row, kind in left)
            label = f"asking {self._endpoint.model:.40}"
            with Progress(label, len(wanted), "answers", done=counts.earlier, quiet=self._quiet) as progress:
                self._run(requests, good, bad, counts, progress)
        return counts

    def _run(
        self,
        requests: Iterator[tuple[SegmentContext, str]],
        good: BinaryIO,
        bad: BinaryIO,
        counts: AnswerCounts,
        progress: Progress,
    ) -> None:
        """Send the requests, at most ``2 * concurrency`` ahead of the answers that are stored."""
        todo: queue.Queue[tuple[SegmentContext, str]] = queue.Queue()
        answers: queue.Queue[_Answer] = queue.Queue()
        stop = threading.Event()
        store = _AnswerStore(good, bad, counts)
        for _ in range(self._concurrency):
            # daemons, so that an end of this process does not wait for a server that hangs
            threading.Thread(target=self._work, args=(todo, answers, stop), daemon=True).start()
        open_requests, stopped = 0, ""
        try:
            while not stopped:
                while open_requests < 2 * self._concurrency and (request := next(requests, None)) is not None:
                    todo.put(request)
                    open_requests += 1
                if not open_requests:
                    stopped = store.finish()
                    break
                batch = [answers.get(), *_available(answers)]
                open_requests -= len(batch)
                stopped = store.add(batch)
                remark = f"{counts.malformed:,} malformed" if counts.malformed else ""
                progress.advance(sum(not answer.down for answer in batch), remark)
        finally:
            stop.set()
            store.add(_available(answers))
        if stopped:
            raise UserError(
                f"{self._endpoint.url}: {stopped}; {counts.good:,} new answers are in {self.file}, and the same "
                "command continues"
            )

    def _work(
        self, todo: queue.Queue[tuple[SegmentContext, str]], answers: queue.Queue[_Answer], stop: threading.Event
    ) -> None:
        """Answer requests until the run stops."""
        while not stop.is_set():
            try:
                context, kind = todo.get(timeout=0.5)
            except queue.Empty:
                continue
            answers.put(self._answer(context, kind, stop))

    def _answer(self, context: SegmentContext, kind: str, stop: threading.Event) -> _Answer:
        prompt = prompt_of(self._template, kind, context)
        images = [frame for frame in context.frames if frame.startswith(("http://", "https://"))]
        try:
            text = self._endpoint.ask(prompt, images, stop, self._notice)
        except RequestRefused as error:
            return _Answer(context, kind, reason=str(error), refused=True)
        except UnusableAnswer as error:
            refused = isinstance(error, NoCompletion)
            return _Answer(context, kind, reason=str(error), text=error.answer, refused=refused)
        except EndpointDown as error:
            return _Answer(context, kind, reason=str(error), down=True)
        except Exception as error:
            # A thread that ends in silence would leave the command waiting for its answer.
            return _Answer(context, kind, reason=one_line(error), down=True)
        try:
            return _Answer(context, kind, parse_answer(context, kind, text))
        except (ValueError, RecursionError) as error:
            return _Answer(context, kind, reason=str(error), text=text)

    def _notice(self, reason: str) -> None:
        """Show why requests are sent again, every few seconds at most; a busy endpoint would look like a hang."""
        now = time.monotonic()
        if not self._quiet and now - self._noticed >= LINE_EVERY_SECONDS:
            self._noticed = now
            logger.info(f"{self._endpoint.url}: {reason}; asking again")


@dataclass
class _AnswerStore:
    """Appends answers to the two files.

    Refusals before the first answer are held back: with a wrong model name every request is refused, and stored
    refusals would never be asked again.
    """

    good: BinaryIO
    bad: BinaryIO
    counts: AnswerCounts
    held: list[_Answer] = field(default_factory=list)

    def add(self, answers: Iterable[_Answer]) -> str:
        """Store answers durably; returns the reason to stop, or an empty text."""
        lines, rejected, stopped = [], [], ""
        for answer in answers:
            if answer.down:
                stopped = answer.reason if stopped in ("", STOPPED) else stopped
            elif answer.refused and not self._answered:
                self.held.append(answer)
            elif answer.annotation is not None:
                self.counts.good += 1
                lines.append(answer.annotation.line())
            else:
                self.counts.malformed += 1
                rejected.append(_rejected_line(answer))
        if self._answered:
            rejected += self._release()
        elif len(self.held) > MAX_REFUSALS:
            stopped = self._refusal
        _append(self.good, lines)
        _append(self.bad, rejected)
        return stopped

    def finish(self) -> str:
        """Store the refusals if earlier runs had answers; otherwise return them as the reason of a failed run."""
        if self.held and not self.counts.earlier:
            return self._refusal
        _append(self.bad, self._release())
        return ""

    @property
    def _answered(self) -> bool:
        return self.counts.good + self.counts.malformed > 0

    @property
    def _refusal(self) -> str:
        return f"refuses every request ({self.held[-1].reason})"

    def _release(self) -> list[str]:
        lines = [_rejected_line(answer) for answer in self.held]
        self.counts.malformed += len(lines)
        self.held.clear()
        return lines


def rejected_file(file: str | Path) -> Path:
    """Return the file beside an annotation file that has the answers that cannot be used."""
    path = Path(file)
    return path.with_name(f"{path.stem}.rejected.jsonl")


def asked_before(file: Path, rejected: Path) -> set[Asked]:
    """Return what has been asked already, by both files; a file that is missing has nothing.

    Raises:
        UserError: a line is not as it should be.
    """
    asked: set[Asked] = set()
    if file.exists():
        for kind, index in AnnotationFile(file).index.items():
            asked.update((one, kind) for one in index.ids.tolist())
    if rejected.exists():
        for number, _, line in annotation_lines(rejected):
            try:
                fields = json.loads(line)
                item, segment, kind = (fields[key] for key in ("item_id", "segment", "kind"))
                if kind not in KINDS or not (0 <= item < MAX_ITEM and 0 <= segment < SEGMENTS_PER_ITEM):
                    raise ValueError
            except (ValueError, TypeError, KeyError, RecursionError):
                raise UserError(
                    f"{rejected}:{number}: damaged; a line has item_id, segment and kind. Remove the line, and the "
                    "segment is asked again"
                ) from None
            asked.add((item * SEGMENTS_PER_ITEM + segment, kind))
    return asked


def prompt_of(template: Template, kind: str, context: SegmentContext) -> str:
    """Return the prompt of a kind for a segment."""
    values = {"number": QUESTIONS} if kind == "questions" else {}
    return template.fill(kind, segment=segment_json(context), **values)


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def segment_json(context: SegmentContext) -> str:
    """Return a segment as JSON for a prompt.

    ``<`` and ``[`` in texts are escaped as JSON allows: no tokenizer of the endpoint finds control tokens such as
    ``<|im_start|>`` in the text of a user, and a text cannot end its place in the prompt.
    """
    fields: dict[str, Any] = {
        "time": context.time,
        "author_information": context.author,
        "room_title": context.room,
        "category": context.tag,
        "speech": context.speech,
        "comments": list(context.comments),
    }
    if context.frames:
        fields["frames"] = len(context.frames)
    text = json.dumps({key: value for key, value in fields.items() if value not in ("", [])}, ensure_ascii=False)
    return _STRING.sub(lambda found: found[0].replace("<", "\\u003c").replace("[", "\\u005b"), text)


def parse_answer(context: SegmentContext, kind: str, text: str) -> Annotation:
    """Return the annotation in the text of an answer; words around the JSON are accepted, keys in any case.

    Raises:
        ValueError: the answer has no such JSON; the message is the reason.
    """
    value = _with_plain_keys(_json_in(text, "[" if kind == "questions" else "{"))
    if kind == "questions":
        questions = check_questions(value)
        if not questions:
            raise ValueError("the answer has no questions")
        return Annotation(context.item_id, context.segment, questions=questions)
    return Annotation(context.item_id, context.segment, description=check_description(value))


def _json_in(text: str, opening: str) -> Any:
    """Return the first JSON value in a text that begins with ``opening``.

    Raises:
        ValueError: there is none.
    """
    decoder, start = json.JSONDecoder(), -1
    for _ in range(_JSON_TRIES):
        start = text.find(opening, start + 1)
        if start < 0:
            break
        try:
            return decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            continue
    raise ValueError(f"the answer has no JSON that begins with {opening}")


def _with_plain_keys(value: Any) -> Any:
    """Return a JSON value whose keys are lower case with underscores; a list of texts under a key becomes one text."""
    if isinstance(value, list):
        return [_with_plain_keys(one) for one in value]
    if not isinstance(value, dict):
        return value
    plain = {"_".join(key.lower().split()): inner for key, inner in value.items()}
    return {
        key: "; ".join(inner) if isinstance(inner, list) and all(isinstance(one, str) for one in inner) else inner
        for key, inner in plain.items()
    }


def _rejected_line(answer: _Answer) -> str:
    fields = {
        "item_id": answer.context.item_id,
        "segment": answer.context.segment,
        "kind": answer.kind,
        "reason": answer.reason,
        "answer": answer.text[:_KEPT_CHARACTERS],
    }
    # ASCII, because an answer may have half of a surrogate pair
    return json.dumps(fields) + "\n"


def _available(answers: queue.Queue[_Answer]) -> Iterator[_Answer]:
    """Yield the answers that are there, without waiting."""
    while True:
        try:
            yield answers.get_nowait()
        except queue.Empty:
            return


@contextmanager
def _appending(path: Path) -> Iterator[BinaryIO]:
    """Yield a file, unbuffered, that only this process appends to; an empty one is removed at the end.

    Raises:
        UserError: it cannot be written, or another process has it.
    """
    try:
        if path.exists():
            # A FIFO or a device cannot be appended to.
            open_regular(path).close()
        file: BinaryIO = path.open("ab", buffering=0)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({failure_reason(error)})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another process writes annotations to it; wait for its end") from None
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _append(file: BinaryIO, lines: Iterable[str]) -> None:
    """Append lines and flush them to disk; after an error no part of them is left."""
    content = "".join(lines).encode()
    if not content:
        return
    end = os.fstat(file.fileno()).st_size
    try:
        write_fully(file, content)
        os.fsync(file.fileno())
    except OSError as error:
        file.truncate(end)
        raise UserError(f"{file.name}: cannot be written ({failure_reason(error)})") from None


def _end_last_line(path: Path, file: BinaryIO, whole: Callable[[bytes], bool]) -> None:
    """Complete the last line of a file if it has no end: a whole entry gets one, the beginning of one is removed.

    Anything else stays, since the file may be another one that was named by mistake; its reader refuses it.
    """
    size = os.fstat(file.fileno()).st_size
    with open_regular(path) as stored:
        stored.seek(max(0, size - MAX_LINE_BYTES))
        tail = stored.read(MAX_LINE_BYTES)
    last = tail[tail.rfind(b"\n") + 1 :]
    if not last:
        return
    # After a power failure, the last blocks of a file may be zeros.
    written = last.rstrip(b"\0")
    if whole(last):
        _append(file, ["\n"])
    elif written.startswith(_FIRST_BYTES) or _FIRST_BYTES.startswith(written):
        file.truncate(size - len(last))


def _is_annotation(line: bytes) -> bool:
    try:
        parse_annotation(line, "")
    except UserError:
        # a person's mistake is a whole line of JSON; the reader names it
        return _is_object(line)
    return True


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
