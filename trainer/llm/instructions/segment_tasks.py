"""Samples of segments: a question and its answer, and a structured description as JSON (both of LARM).

The prompt of a sample has only what is known at the end of its segment. A sample for training has its answer alone. One
for evaluation has options as well: its own answer and answers of other segments of the evaluation, where possible of
the same question, in an order that is drawn from seed and segment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trainer.llm.instructions.annotations import Annotation, AnnotationIndex
from trainer.llm.instructions.sample_files import Record
from trainer.llm.instructions.segments import SegmentContext, SegmentTexts
from trainer.llm.models.prompt_templates import Template

QUESTION, DESCRIPTION = "segment_question", "segment_description"
SEGMENT_TASKS: dict[str, str] = {QUESTION: "questions", DESCRIPTION: "description"}
"""Task -> part of an annotation that it is made from."""

_CONTEXT = frozenset({"author", "room", "tag", "time", "frames", "comments", "speech"})
PLACEHOLDERS: dict[str, frozenset[str]] = {
    "segment": _CONTEXT,
    "frames": frozenset({"frames"}),
    "comments": frozenset({"comments"}),
    "comment": frozenset({"comment"}),
    "none": frozenset(),
    "question": frozenset({"segment", "question"}),
    "description": frozenset({"segment"}),
}
"""Placeholders in braces that the template may have, by section."""


class AnnotationSource(Protocol):
    """Annotations by segment: a file, or the truth of a simulated world."""

    lines: int
    index: dict[str, AnnotationIndex]

    def read(self, offsets: np.ndarray, /) -> Iterator[Annotation]:
        """Yield the annotations at offsets of an index, in that order."""


@dataclass(frozen=True)
class SampleList:
    """Samples that can be made of one task, in order of segment and number of the question.

    Attributes:
        row: ``[n] int64``, positions in the segments.
        offset: ``[n] int64``, place of the annotation.
        number: ``[n] int64``, number of the question in the annotation, from 0.
        unknown: number of annotations of segments that the dataset does not have.
        blank: number of annotations of segments without speech and frames.
    """

    row: np.ndarray
    offset: np.ndarray
    number: np.ndarray
    unknown: int
    blank: int

    @staticmethod
    def of(index: AnnotationIndex, segments: SegmentTexts) -> SampleList:
        """Return the samples of the annotations whose segments the dataset has."""
        row = np.minimum(np.searchsorted(segments.ids, index.ids), max(len(segments.ids) - 1, 0))
        known = segments.ids[row] == index.ids if len(segments.ids) else np.zeros(len(row), bool)
        usable = known.copy()
        usable[known] = segments.filled[row[known]]
        sizes = index.number[usable]
        number = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return SampleList(
            np.repeat(row[usable], sizes),
            np.repeat(index.offset[usable], sizes),
            number,
            unknown=int((~known).sum()),
            blank=int((known & ~usable).sum()),
        )

    def at(self, positions: np.ndarray) -> SampleList:
        """Return the samples at positions, in that order."""
        return SampleList(self.row[positions], self.offset[positions], self.number[positions], self.unknown, self.blank)


class SegmentSampler:
    """Maker of samples of segments.

    Args:
        segments: segments of the dataset.
        source: annotations.
        template: template with the sections of ``PLACEHOLDERS``.
        candidates: options of an evaluation sample.
        seed: seed of the options and of their order.

    Attributes:
        without_options: number of evaluation samples that were left out, as fewer than two different answers exist.
    """

    def __init__(
        self, segments: SegmentTexts, source: AnnotationSource, template: Template, *, candidates: int, seed: int
    ) -> None:
        self._segments, self._source, self._template = segments, source, template
        self._candidates, self._seed = candidates, seed
        self.without_options = 0

    def training(self, task: str, samples: SampleList) -> Iterator[Record]:
        """Yield the samples of a task, in order; one at a time is in memory."""
        annotations = self._source.read(samples.offset)
        for row, number, annotation in zip(samples.row.tolist(), samples.number.tolist(), annotations, strict=True):
            context = self._segments.context(row)
            question, answer = _pair(task, annotation, number)
            yield _record(task, self.prompt(task, context, question), answer, context)

    def evaluation(self, task: str, samples: SampleList) -> Iterator[Record]:
        """Yield the samples of a task with options, in order. All answers are in memory."""
        annotations = self._source.read(samples.offset)
        pairs = [
            _pair(task, annotation, number)
            for number, annotation in zip(samples.number.tolist(), annotations, strict=True)
        ]
        every = sorted({answer for _, answer in pairs})
        by_question: dict[str, list[str]] = {}
        for question, answer in sorted(set(pairs)):
            by_question.setdefault(question, []).append(answer)
        for row, number, (question, answer) in zip(samples.row.tolist(), samples.number.tolist(), pairs, strict=True):
            context = self._segments.context(row)
            key = [self._seed, list(SEGMENT_TASKS).index(task), context.item_id, context.segment, number]
            options = self._options(answer, by_question[question], every, np.random.default_rng(key))
            if len(options) < 2:
                self.without_options += 1
                continue
            yield {**_record(task, self.prompt(task, context, question), answer, context), "options": options}

    def prompt(self, task: str, context: SegmentContext, question: str) -> str:
        """Return the prompt of a task; ``question`` is for the task ``segment_question`` only."""
        fill = self._template.fill
        comments = [fill("comment", comment=text) for text in context.comments]
        none = self._template.sections["none"]
        segment = fill(
            "segment",
            author=context.author or none,
            room=context.room or none,
            tag=context.tag or none,
            time=context.time or none,
            frames=fill("frames", frames=" ".join(context.frames)) if context.frames else "",
            comments=fill("comments", comments="\n".join(comments)) if comments else "",
            speech=context.speech or none,
        )
        segment = "\n".join(line for line in segment.splitlines() if line.strip())
        if task == QUESTION:
            return fill("question", segment=segment, question=question) + "\n"
        return fill("description", segment=segment) + "\n"

    def _options(self, answer: str, near: list[str], every: list[str], rng: np.random.Generator) -> list[str]:
        """Return the answer and others, answers of the same question first, in a drawn order."""
        others: list[str] = []
        for pool in (near, every):
            for place in rng.permutation(len(pool)):
                if len(others) == self._candidates - 1:
                    break
                if pool[place] != answer and pool[place] not in others:
                    others.append(pool[place])
        options = [answer, *others]
        return [options[place] for place in rng.permutation(len(options))]


def _pair(task: str, annotation: Annotation, number: int) -> tuple[str, str]:
    """Return question and answer of a sample; a description has no question."""
    if task == QUESTION:
        return annotation.questions[number]
    return "", json.dumps(annotation.description, ensure_ascii=False)


def _record(task: str, prompt: str, answer: str, context: SegmentContext) -> Record:
    """Return a sample; ``frames`` is there where the segment has any."""
    keys: Record = {"item_id": context.item_id, "segment": context.segment, "time_ms": context.start_ms}
    if context.frames:
        keys["frames"] = list(context.frames)
    return {"task": task, "prompt": prompt, "answer": answer, **keys}
