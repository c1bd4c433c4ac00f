"""The three tasks, as samples: what is asked, the answer, and what else could have been answered.

Only what was known at the request stands in a prompt: earlier stays and interactions of the user, and the comments at
the top of the area then. Candidates are in an order drawn from the seed and the visit, so that their place says nothing
of them.

A range or the best comment is answered by its letter. The comment that a user likes is answered by its text, in the
form in which earlier ones stand in the prompt: what is probable there is what the user has liked before. A letter would
have to be found by comparing each option with the history, which a small model does not learn from some ten thousand
samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.llm.instructions.buckets import bucket_of, ranges
from trainer.llm.instructions.past import Past
from trainer.llm.instructions.visits import Texts, Visits
from trainer.llm.models.prompt_templates import Template

TASKS: tuple[str, ...] = ("staytime", "top_comment", "user_comment")

_VIDEO = frozenset({"video", "tag"})
PLACES: dict[str, dict[str, frozenset[str]]] = {
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
"""Task -> section of its template -> what may stand in braces there."""

_SHORTEST, _LONGEST, _STRIDE = 3, 20, 5
"""Comments of a general sample, and from one of a user's samples to the next."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Record = dict[str, Any]
"""A sample as it is written: ``task, prompt, answer, options, popularity, visit_id, time_ms``."""


@dataclass
class Counts:
    """What happened while samples were made: texts cut at their length, and visits without a sample."""

    cut: int = 0
    without_sample: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TASKS, 0))


class Tasks:
    """Makes samples of a dataset.

    Args:
        dataset: its path.
        visits: of it.
        templates: task -> template with the sections of ``PLACES``.
        edges: of the staytime ranges, in seconds.
        fitted: positions of the visits of the training days.
        candidates: most comments to choose from, and to show.
        history: most earlier stays or interactions.
        characters: a longer text is cut.
        seed: of orders and candidates.
    """

    def __init__(
        self,
        dataset: str | Path,
        visits: Visits,
        templates: dict[str, Template],
        edges: tuple[float, ...],
        fitted: np.ndarray,
        *,
        candidates: int,
        history: int,
        characters: int,
        seed: int,
    ) -> None:
        self.counts = Counts()
        self._visits, self._templates, self._seed = visits, templates, seed
        self._candidates, self._history, self._characters = candidates, history, characters
        self._items = Texts(dataset, "items", "item_id", ["text", "tag"])
        self._comments = Texts(dataset, "comments", "comment_id", ["text", "time_ms"])
        self._ranges, self._bucket = ranges(edges), bucket_of(visits.staytime_ms, edges)
        self._stays = Past(visits.user_id, visits.known_ms, np.arange(len(visits.visit_id)))
        owner = np.repeat(np.arange(len(visits.visit_id)), visits.interacted.lengths)
        self._touched = Past(visits.user_id[owner], visits.known_ms[owner], visits.interacted.values)
        self._popularity = _BucketCounts(visits.item_id[fitted], self._bucket[fitted], len(self._ranges))

    def samples(self, task: str, at: np.ndarray, most: int) -> Iterator[Record]:
        """Up to ``most`` samples of a task from the visits at positions ``at``, in that order."""
        make = {"staytime": self._staytime, "top_comment": self._top_comment, "user_comment": self._user_comment}[task]
        made = 0
        for place in at.tolist():
            if made == most:
                return
            record = make(place)
            if record is None:
                self.counts.without_sample[task] += 1
                continue
            made += 1
            ids = {"visit_id": int(self._visits.visit_id[place]), "time_ms": int(self._visits.request_ms[place])}
            yield {"task": task, **record, **ids}

    def _staytime(self, place: int) -> Record | None:
        """How long? Answers are the ranges in their own order."""
        visits, template = self._visits, self._templates["staytime"]
        then = self._stays.latest(visits.user_id[place], visits.request_ms[place], self._history)
        *videos, video = self._videos(visits.item_id[np.append(then, place)])
        if not video["video"]:
            return None
        earlier = [
            template.fill("history", **seen, answer=LETTERS[bucket], seconds=f"{staytime_ms / 1000:.0f}")
            for seen, bucket, staytime_ms in zip(videos, self._bucket[then], visits.staytime_ms[then], strict=True)
        ]
        texts = self._texts(visits.shown[place][: self._candidates])
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
        popularity = self._popularity.of(visits.item_id[place])
        return _letter_of(prompt, int(self._bucket[place]), popularity)

    def _top_comment(self, place: int) -> Record | None:
        """Which has most likes at the time? Where two share the first place there is no answer."""
        visits, template = self._visits, self._templates["top_comment"]
        (video,) = self._videos(visits.item_id[place : place + 1])
        rng = self._generator("top_comment", place)
        shown, likes = visits.shown[place], visits.shown_likes[place]
        if len(likes) < len(shown) or not video["video"]:
            return None
        chosen = rng.permutation(len(shown))[: self._candidates]
        chosen = chosen[np.array([bool(text) for text in self._texts(shown[chosen])], bool)]
        if len(chosen) < 2 or (likes[chosen] == likes[chosen].max()).sum() > 1:
            return None
        written = self._comments.numbers(shown[chosen], "time_ms")
        age_hours = (visits.request_ms[place] - np.maximum(written, 0)) / 3_600_000
        options = [
            template.fill("option", letter=letter, comment=text)
            for letter, text in zip(LETTERS, self._texts(shown[chosen]), strict=False)
        ]
        prompt = template.fill("prompt", **video, options="\n".join(options))
        return _letter_of(prompt, int(np.argmax(likes[chosen])), age_hours)

    def _user_comment(self, place: int) -> Record | None:
        """Which does the user like or answer? One of those, among others that were shown and left alone."""
        visits, template = self._visits, self._templates["user_comment"]
        (video,) = self._videos(visits.item_id[place : place + 1])
        rng = self._generator("user_comment", place)
        shown, likes = visits.shown[place], visits.shown_likes[place]
        touched, texts = np.isin(shown, visits.interacted[place]), np.array(self._texts(shown), object)
        right = np.flatnonzero(touched & (texts != ""))
        if not len(right) or not video["video"]:
            return None
        answer = rng.choice(right)
        # A text that stands twice, or was liked too, would be a second right answer.
        _, first = np.unique(texts, return_index=True)
        wrong = [other for other in np.sort(first) if texts[other] not in ("", *texts[touched])]
        if not wrong:
            return None
        chosen = rng.permutation(np.append(answer, rng.permutation(wrong)[: self._candidates - 1]))
        earlier = self._touched.latest(visits.user_id[place], visits.request_ms[place], self._history)
        past = [template.fill("history", comment=text) for text in self._texts(earlier) if text]
        options = "\n".join(template.fill("option", comment=text) for text in texts[chosen])
        prompt = template.fill("prompt", **video, history=_lines(template, past), options=options)
        return _record(
            f"{prompt}\n",
            [template.fill("history", comment=text) for text in texts[chosen]],
            int(np.flatnonzero(chosen == answer)[0]),
            likes[chosen] if len(likes) == len(shown) else np.zeros(len(chosen)),
        )

    def liked(self, before_ms: int) -> Iterator[Record]:
        """General samples: what users liked or answered before a time, list by list, all of it to be learnt.

        Lists of a user overlap: each begins ``_STRIDE`` comments after the one before.
        """
        template = self._templates["user_comment"]
        for user in self._touched.users.tolist():
            comments = self._touched.latest(user, before_ms, np.iinfo(np.int64).max)
            lines = [template.fill("history", comment=text) for text in self._texts(comments) if text]
            for first in range(0, len(lines) - _SHORTEST + 1, _STRIDE):
                yield {
                    "task": "liked",
                    "prompt": template.sections["liked"] + "\n",
                    "answer": "\n".join(lines[first : first + _LONGEST]),
                }

    def _generator(self, task: str, place: int) -> np.random.Generator:
        """The random stream of a visit: which other visits are drawn, and how many, has no part in it."""
        return np.random.default_rng([self._seed, TASKS.index(task), int(self._visits.visit_id[place])])

    def _videos(self, items: np.ndarray) -> list[dict[str, str]]:
        pairs = zip(self._items.of(items, "text"), self._items.of(items, "tag"), strict=True)
        return [{"video": self._cut(text), "tag": tag or "no category"} for text, tag in pairs]

    def _texts(self, comments: np.ndarray) -> list[str]:
        return [self._cut(text) for text in self._comments.of(comments, "text")]

    def _cut(self, text: str) -> str:
        self.counts.cut += len(text) > self._characters
        return text[: self._characters]


class _BucketCounts:
    """How often each range was stayed in, video by video."""

    def __init__(self, item: np.ndarray, bucket: np.ndarray, buckets: int) -> None:
        self._items, row = np.unique(item, return_inverse=True)
        self._counts = np.bincount(row * buckets + bucket, minlength=len(self._items) * buckets).reshape(-1, buckets)
        total = np.bincount(bucket, minlength=buckets)
        self._share = total / max(1, total.sum())

    def of(self, item: int) -> np.ndarray:
        """Counts of a video and, to decide where they are even or none, the shares of all videos."""
        place = int(np.searchsorted(self._items, item))
        known = place < len(self._items) and self._items[place] == item
        return self._share + (self._counts[place] if known else 0)


def _letter_of(prompt: str, answer: int, popularity: np.ndarray) -> Record:
    """A choice by letters. The prompt ends with one space, whatever an editor has made of the end of the line."""
    return _record(f"{prompt} ", list(LETTERS[: len(popularity)]), answer, popularity)


def _record(prompt: str, options: Sequence[str], answer: int, popularity: np.ndarray) -> Record:
    return {
        "prompt": prompt,
        "answer": options[answer],
        "options": options,
        "popularity": [round(float(figure), 4) for figure in popularity],
    }


def _lines(template: Template, lines: Sequence[str]) -> str:
    return "\n".join(lines) or template.sections["none"]
