"""Samples of the three tasks: prompt, answer, and the options of the answer.

A prompt uses only what was known at the request: earlier stays and interactions of the user, and the comments at the
top of the area at that time. The order of candidates is drawn from the seed and the visit, so that their position gives
no information.

The answer for a range or for the best comment is its letter. The answer for the comment that a user likes is its text,
in the same form as the earlier comments in the prompt, so that comments like those become probable. To answer by a
letter, a model would have to compare each option with the history, which a small model does not learn from about ten
thousand samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainer.llm.instructions.buckets import bucket_of, ranges
from trainer.llm.instructions.past import UserTimeline
from trainer.llm.instructions.sample_files import Record
from trainer.llm.instructions.visits import OpenedVisits, TextLookup
from trainer.llm.models.prompt_templates import Template

TASKS: tuple[str, ...] = ("staytime", "top_comment", "user_comment")

_VIDEO = frozenset({"video", "tag"})
PLACEHOLDERS: dict[str, dict[str, frozenset[str]]] = {
    "staytime": {
        "prompt": _VIDEO | {"history", "comments", "options"},
        "history": _VIDEO | {"answer", "seconds"},
        "comment": frozenset({"comment"}),
        "option": frozenset({"letter", "range"}),
        "none": frozenset(),
    },
    "top_comment": {
        "prompt": _VIDEO | {"options"},
        "option": frozenset({"letter", "comment"}),
    },
    "user_comment": {
        "prompt": _VIDEO | {"history", "options"},
        "history": frozenset({"comment"}),
        "option": frozenset({"comment"}),
        "none": frozenset(),
        "liked": frozenset(),
    },
}
"""Placeholders in braces that a template may have, by task and section."""

_SHORTEST, _LONGEST, _STRIDE = 3, 20, 5
"""Fewest and most comments of a general sample, and comments between the starts of a user's consecutive samples."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class SampleCounts:
    """Counts of the texts that were cut, and of the visits without a sample, by task."""

    cut: int = 0
    without_sample: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TASKS, 0))


class TaskSampler:
    """Maker of samples of a dataset.

    Args:
        dataset: path of the dataset.
        visits: visits of the dataset.
        templates: templates by task, with the sections of ``PLACEHOLDERS``.
        edges: edges of the staytime ranges, in seconds.
        fitted: positions of the visits of the training days.
        candidates: most comments to choose from, and to show.
        history: most earlier stays or interactions in a prompt.
        characters: most characters of a text; a longer text is cut.
        seed: seed of the selection and order of candidates.
    """

    def __init__(
        self,
        dataset: str | Path,
        visits: OpenedVisits,
        templates: dict[str, Template],
        edges: tuple[float, ...],
        fitted: np.ndarray,
        *,
        candidates: int,
        history: int,
        characters: int,
        seed: int,
    ) -> None:
        self.counts = SampleCounts()
        self._visits, self._templates, self._seed = visits, templates, seed
        self._candidates, self._history, self._characters = candidates, history, characters
        self._items = TextLookup(dataset, "items", "item_id", ["text", "tag"])
        self._comments = TextLookup(dataset, "comments", "comment_id", ["text", "time_ms"])
        self._ranges, self._bucket = ranges(edges), bucket_of(visits.staytime_ms, edges)
        self._visits_by_user = UserTimeline(visits.user_id, visits.known_ms, np.arange(len(visits.visit_id)))
        owner = np.repeat(np.arange(len(visits.visit_id)), visits.interacted.lengths)
        self._interacted = UserTimeline(visits.user_id[owner], visits.known_ms[owner], visits.interacted.values)
        self._popularity = _RangePopularity(visits.item_id[fitted], self._bucket[fitted], len(self._ranges))

    def samples(self, task: str, rows: np.ndarray, most: int, *, bare: bool = False) -> Iterator[Record]:
        """Yield up to ``most`` samples of a task from the visits at positions ``rows``, in that order.

        A record has ``task, prompt, answer, options, popularity, visit_id, time_ms``, and with ``bare``, if the answers
        are texts, ``bare_prompt``: the prompt of a user without a history.
        """
        make = {"staytime": self._staytime, "top_comment": self._top_comment, "user_comment": self._user_comment}[task]
        written = 0
        for row in rows.tolist():
            if written == most:
                return
            record = make(row)
            if record is None:
                self.counts.without_sample[task] += 1
                continue
            if not bare:
                record.pop("bare_prompt", None)
            written += 1
            ids = {"visit_id": int(self._visits.visit_id[row]), "time_ms": int(self._visits.request_ms[row])}
            yield {"task": task, **record, **ids}

    def _staytime(self, row: int) -> Record | None:
        """Return the sample that asks how long the user stays; None if the video has no title.

        The options are the ranges in increasing order.
        """
        visits, template = self._visits, self._templates["staytime"]
        earlier_rows = self._visits_by_user.latest(visits.user_id[row], visits.request_ms[row], self._history)
        *videos, video = self._videos(visits.item_id[np.append(earlier_rows, row)])
        if not video["video"]:
            return None
        earlier = [
            template.fill("history", **seen, answer=LETTERS[bucket], seconds=f"{staytime_ms / 1000:.0f}")
            for seen, bucket, staytime_ms in zip(
                videos, self._bucket[earlier_rows], visits.staytime_ms[earlier_rows], strict=True
            )
        ]
        texts = self._texts(visits.shown[row][: self._candidates])
        options = [
            template.fill("option", letter=letter, range=words)
            for letter, words in zip(LETTERS, self._ranges, strict=False)
        ]
        prompt = template.fill(
            "prompt",
            **video,
            history=_lines(template, earlier),
            comments=_lines(template, [template.fill("comment", comment=text) for text in texts if text]),
            options="\n".join(options),
        )
        popularity = self._popularity.counts(visits.item_id[row])
        return _letter_record(prompt, int(self._bucket[row]), popularity)

    def _top_comment(self, row: int) -> Record | None:
        """Return the sample that asks which comment has the most likes at the time.

        It is None if two comments share the first place, likes are not recorded, fewer than two comments have texts, or
        the video has no title.
        """
        visits, template = self._visits, self._templates["top_comment"]
        (video,) = self._videos(visits.item_id[row : row + 1])
        rng = self._generator("top_comment", row)
        shown, likes = visits.shown[row], visits.shown_likes[row]
        if len(likes) < len(shown) or not video["video"]:
            return None
        chosen = rng.permutation(len(shown))[: self._candidates]
        chosen = chosen[np.array([bool(text) for text in self._texts(shown[chosen])], bool)]
        if len(chosen) < 2 or (likes[chosen] == likes[chosen].max()).sum() > 1:
            return None
        written = self._comments.numbers(shown[chosen], "time_ms")
        age_hours = (visits.request_ms[row] - np.maximum(written, 0)) / 3_600_000
        options = [
            template.fill("option", letter=letter, comment=text)
            for letter, text in zip(LETTERS, self._texts(shown[chosen]), strict=False)
        ]
        prompt = template.fill("prompt", **video, options="\n".join(options))
        return _letter_record(prompt, int(np.argmax(likes[chosen])), age_hours)

    def _user_comment(self, row: int) -> Record | None:
        """Return the sample that asks which comment the user likes or answers.

        The options are one such comment and others that were shown without an interaction. It is None if either kind
        is missing or the video has no title.
        """
        visits, template = self._visits, self._templates["user_comment"]
        (video,) = self._videos(visits.item_id[row : row + 1])
        rng = self._generator("user_comment", row)
        shown, likes = visits.shown[row], visits.shown_likes[row]
        interacted, texts = np.isin(shown, visits.interacted[row]), np.array(self._texts(shown), object)
        right = np.flatnonzero(interacted & (texts != ""))
        if not len(right) or not video["video"]:
            return None
        answer = rng.choice(right)
        # a text that occurs twice, or that the user liked as well, would be a second right answer
        _, first = np.unique(texts, return_index=True)
        wrong = [other for other in np.sort(first) if texts[other] not in ("", *texts[interacted])]
        if not wrong:
            return None
        chosen = rng.permutation(np.append(answer, rng.permutation(wrong)[: self._candidates - 1]))
        earlier = self._interacted.latest(visits.user_id[row], visits.request_ms[row], self._history)
        past = [template.fill("history", comment=text) for text in self._texts(earlier) if text]
        options = "\n".join(template.fill("option", comment=text) for text in texts[chosen])
        prompt, bare = (
            template.fill("prompt", **video, history=_lines(template, lines), options=options) for lines in (past, [])
        )
        record = _record(
            f"{prompt}\n",
            [template.fill("history", comment=text) for text in texts[chosen]],
            int(np.flatnonzero(chosen == answer)[0]),
            likes[chosen] if len(likes) == len(shown) else np.zeros(len(chosen)),
        )
        return {**record, "bare_prompt": f"{bare}\n"}

    def liked(self, before_ms: int) -> Iterator[Record]:
        """Yield general samples: lists of comments that users liked or answered before a time.

        Lists of a user overlap: each starts ``_STRIDE`` comments after the one before.
        """
        template = self._templates["user_comment"]
        for user in self._interacted.users.tolist():
            comments = self._interacted.latest(user, before_ms, np.iinfo(np.int64).max)
            lines = [template.fill("history", comment=text) for text in self._texts(comments) if text]
            for first in range(0, len(lines) - _SHORTEST + 1, _STRIDE):
                yield {
                    "task": "liked",
                    "prompt": template.sections["liked"] + "\n",
                    "answer": "\n".join(lines[first : first + _LONGEST]),
                }

    def _generator(self, task: str, row: int) -> np.random.Generator:
        """Return the random stream of a visit; it does not depend on the selection of other visits."""
        return np.random.default_rng([self._seed, TASKS.index(task), int(self._visits.visit_id[row])])

    def _videos(self, items: np.ndarray) -> list[dict[str, str]]:
        """Return the placeholders ``video`` and ``tag`` of each item."""
        pairs = zip(self._items.texts(items, "text"), self._items.texts(items, "tag"), strict=True)
        return [{"video": self._cut(text), "tag": tag or "no category"} for text, tag in pairs]

    def _texts(self, comments: np.ndarray) -> list[str]:
        """Return the texts of comments, cut to the most characters; empty where there is none."""
        return [self._cut(text) for text in self._comments.texts(comments, "text")]

    def _cut(self, text: str) -> str:
        """Return at most the first ``characters`` characters of a text, and count the cut."""
        self.counts.cut += len(text) > self._characters
        return text[: self._characters]


class _RangePopularity:
    """Counts of the staytime ranges by video."""

    def __init__(self, item: np.ndarray, bucket: np.ndarray, buckets: int) -> None:
        self._items, row = np.unique(item, return_inverse=True)
        self._counts = np.bincount(row * buckets + bucket, minlength=len(self._items) * buckets).reshape(-1, buckets)
        total = np.bincount(bucket, minlength=buckets)
        self._share = total / max(1, total.sum())

    def counts(self, item: int) -> np.ndarray:
        """Return the counts of a video plus the shares of all videos, which break ties, ``[buckets] float64``."""
        row = int(np.searchsorted(self._items, item))
        known = row < len(self._items) and self._items[row] == item
        return self._share + (self._counts[row] if known else 0)


def _letter_record(prompt: str, answer: int, popularity: np.ndarray) -> Record:
    """Return a sample that is answered by a letter.

    The space after the prompt is added here, because an editor may remove a space at the end of the template.
    """
    return _record(f"{prompt} ", list(LETTERS[: len(popularity)]), answer, popularity)


def _record(prompt: str, options: Sequence[str], answer: int, popularity: np.ndarray) -> Record:
    """Return a sample; ``answer`` is the position of the right option, ``popularity [options]`` a baseline's scores."""
    return {
        "prompt": prompt,
        "answer": options[answer],
        "options": options,
        "popularity": [round(float(figure), 4) for figure in popularity],
    }


def _lines(template: Template, lines: Sequence[str]) -> str:
    """Join lines; without any, return the template's section ``none``."""
    return "\n".join(lines) or template.sections["none"]
