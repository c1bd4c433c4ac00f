"""A conditional logit on hand-made features of the instruction samples: about the best that their words allow.

The features know the simulated world's lists of words (the quality of a word, the kind of a phrase) and count what
LCU's tasks are drawn from, so a model that reads the same prompt can hardly do better. They parse the templates of
``configs/templates``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from trainer.data.simulator.words import BANDS, COMMENT_MARKS, FRAMES, KINDS, TOPIC_WORDS, VIDEO_MARKS
from trainer.llm.finetuning.samples import Sample

PENALTY = 1e-4
_OPTION = re.compile(r"^(.*) \([A-Z]\)$")
_HISTORY = re.compile(r"^- .* \(([A-Z])\)$")
_VIDEO = re.compile(r"^(.*) clip of .* \((\w+)\)$")
_BANDS = {mark: band for band, marks in enumerate(COMMENT_MARKS) for mark in marks}
_VIDEO_BANDS = {mark: band for band, marks in enumerate(VIDEO_MARKS) for mark in marks}
_KINDS = {phrase: kind for kind, phrases in enumerate(FRAMES.values()) for phrase in phrases}
_GENRES = {word: genre for genre, words in enumerate(TOPIC_WORDS) for word in words}
_COMMENT = re.compile(rf"^({'|'.join(_BANDS)}) ({'|'.join(_KINDS)}) (\w+) (\w+)$")
_MOST_ALIKE = 3
"""Most earlier comments of a kind or a genre that are counted."""

Comment = tuple[int, int, int]
"""Band of quality, kind, genre."""


def accuracy_of_words(train: Sequence[Sample], held_out: Sequence[Sample]) -> float:
    """Return the share of held-out samples of one task that a logit, fitted on training samples, gets right."""
    inputs, there, answers = _columns(train)
    weights = torch.zeros(inputs.shape[-1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (
            torch.nn.functional.cross_entropy(_scores(inputs, there, weights), answers)
            + PENALTY * weights.square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)
    inputs, there, answers = _columns(held_out)
    return float((_scores(inputs, there, weights.detach()).argmax(1) == answers).double().mean())


def _scores(inputs: torch.Tensor, there: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (inputs @ weights).masked_fill(~there, -torch.inf)


def _columns(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features ``[samples, options, k]``, a mask of the options, and the indices of the right ones."""
    of_task = {"staytime": _staytime, "top_comment": _top_comment, "user_comment": _user_comment}
    rows = [of_task[sample.task](sample.prompt.splitlines(), sample.options) for sample in samples]
    most = max(map(len, rows))
    inputs = np.zeros((len(rows), most, rows[0].shape[1]), np.float32)
    for row, features in zip(inputs, rows, strict=True):
        row[: len(features)] = features
    there = np.arange(most) < np.array([[len(features)] for features in rows])
    answers = [sample.options.index(sample.answer) for sample in samples]
    return torch.from_numpy(inputs), torch.from_numpy(there), torch.tensor(answers)


def _top_comment(lines: Sequence[str], options: Sequence[str]) -> np.ndarray:
    genre = _video(lines)[1]
    found = [found[1] for line in lines if (found := _OPTION.match(line)) and _is_comment(found[1])]
    return np.stack([_plain(_comment(text), genre) for text in found[-len(options) :]])


def _user_comment(lines: Sequence[str], options: Sequence[str]) -> np.ndarray:
    genre, earlier = _video(lines)[1], _comments(lines)
    kinds, genres = Counter(kind for _, kind, _ in earlier), Counter(genre for _, _, genre in earlier)
    alike = np.eye(_MOST_ALIKE + 1)
    return np.stack(
        [
            np.concatenate(
                [
                    _plain(comment, genre),
                    alike[min(kinds[comment[1]], _MOST_ALIKE)],
                    alike[min(genres[comment[2]], _MOST_ALIKE)],
                    [kinds[comment[1]] / (1 + len(earlier))],
                ]
            )
            for comment in map(_comment, (option.removeprefix("- ") for option in options))
        ]
    )


def _staytime(lines: Sequence[str], options: Sequence[str]) -> np.ndarray:
    """Return features with one set of weights for each range of the staytime."""
    band, genre = _video(lines)
    stays = [ord(found[1]) - ord("A") for line in lines if (found := _HISTORY.match(line))]
    shown = [_plain(comment, genre) for comment in _comments(lines)]
    features = np.concatenate(
        [
            np.bincount(stays, minlength=len(options))[: len(options)],
            [1, len(stays), np.mean(stays) if stays else (len(options) - 1) / 2, len(shown)],
            np.mean(shown, axis=0) if shown else np.zeros(BANDS + len(KINDS) + 1),
            np.eye(BANDS)[band],
        ]
    )
    return np.kron(np.eye(len(options)), features)


def _plain(comment: Comment, genre: int) -> np.ndarray:
    """Return the features of a comment that do not depend on its reader."""
    band, kind, topic = comment
    return np.concatenate([np.eye(BANDS)[band], np.eye(len(KINDS))[kind], [topic == genre]])


def _video(lines: Sequence[str]) -> tuple[int, int]:
    """Return band and genre of the video."""
    found = next(found for line in lines if (found := _VIDEO.match(line)))
    return _VIDEO_BANDS[found[1]], _GENRES[found[2]]


def _comments(lines: Sequence[str]) -> list[Comment]:
    """Return the comments in lines that begin with a dash: earlier ones of the user, or the top ones."""
    return [_comment(line.removeprefix("- ")) for line in lines if line.startswith("- ") and _is_comment(line[2:])]


def _is_comment(text: str) -> bool:
    return _COMMENT.match(text) is not None


def _comment(text: str) -> Comment:
    found = _COMMENT.match(text)
    assert found is not None
    return _BANDS[found[1]], _KINDS[found[2]], _GENRES[found[4]]
