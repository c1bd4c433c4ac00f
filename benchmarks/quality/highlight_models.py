"""Models of ``benchmarks/quality/highlights.py`` and their training.

All have the same head (two layers and a sigmoid), the same loss and the same schedule. They differ in what the head
reads at a position: vectors of the position itself (``row``), and the state of a sequence network over the segments up
to the position (``sequence``), those of the author's earlier rooms first.

The loss is that of KuaiLive-M3's benchmark, with its weights: the squared error, half a pairwise logistic loss (pairs
of segments of a room whose scores differ by more than 0.2), and 0.3 of the squared error that weighs 2 more for each
neighbour whose score differs by more than 0.15. The epoch is the one with the largest mAP on the rooms to choose by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quality.highlight_metrics import average_precision
from benchmarks.quality.highlight_rooms import TEST, TRAIN, VALIDATE, HighlightRoom, HighlightRooms, Predictions

DIM, LAYERS, HEADS, DROPOUT = 64, 2, 4, 0.1
BATCH_ROOMS = 16
WEIGHT_DECAY, CLIP = 1e-4, 1.0
PAIR_WEIGHT, PAIR_DELTA = 0.5, 0.2
BORDER_WEIGHT, BORDER_DELTA, BORDER_GAMMA = 0.3, 0.15, 2.0

Sequence_ = Literal["", "gru", "transformer"]


@dataclass(frozen=True)
class HighlightTraining:
    """Schedule of a training.

    Attributes:
        epochs: passes over the training rooms.
        learning_rate: of AdamW at the start; a cosine leads to 1 % of it.
        seed: of weights, order and dropout.
    """

    epochs: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class SegmentInputs:
    """Inputs of a model for all segments of the code file.

    Attributes:
        sequence: ``[n, width] float32``, read by a sequence network; None without one.
        row: ``[n, width] float32``, read by the head at the position; None without.
    """

    sequence: np.ndarray | None = None
    row: np.ndarray | None = None


@dataclass(frozen=True)
class RoomBatch:
    """Rooms, padded at the end.

    Attributes:
        rooms: the rooms.
        score: ``[B, T] float32``.
        known: ``[B, T] bool``, positions that are there.
    """

    rooms: Sequence[HighlightRoom]
    score: Tensor
    known: Tensor

    @staticmethod
    def of(rooms: Sequence[HighlightRoom]) -> RoomBatch:
        """Return some rooms."""
        longest = max(len(room) for room in rooms)
        score, known = np.zeros((len(rooms), longest), np.float32), np.zeros((len(rooms), longest), bool)
        for place, room in enumerate(rooms):
            score[place, : len(room)], known[place, : len(room)] = room.score, True
        return RoomBatch(rooms, torch.from_numpy(score), torch.from_numpy(known))


class HighlightHead(nn.Module):
    """Two layers and a sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Dropout(DROPOUT), nn.Linear(width, DIM), nn.ReLU(), nn.Linear(DIM, 1)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Return the predictions ``[...]`` of states ``[..., width]``."""
        return torch.sigmoid(self.layers(states)[..., 0])


class SegmentsModel(nn.Module):
    """Model that reads the segments of the author and of the room up to the position, or the position's vectors alone.

    Args:
        inputs: of all segments.
        kind: sequence network; empty for none.
        longest: longest history and room together.
    """

    def __init__(self, inputs: SegmentInputs, kind: Sequence_, longest: int) -> None:
        super().__init__()
        self._inputs, self._kind = inputs, kind
        width = 0 if inputs.row is None else inputs.row.shape[1]
        if kind:
            assert inputs.sequence is not None
            # One more: whether a segment is of the room itself.
            self.project = nn.Linear(inputs.sequence.shape[1] + 1, DIM)
        if kind == "gru":
            self.network: nn.Module = nn.GRU(DIM, DIM, LAYERS, batch_first=True, dropout=DROPOUT)
        elif kind == "transformer":
            self.places = nn.Embedding(longest, DIM)
            layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, DROPOUT, batch_first=True)
            self.network = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = HighlightHead(width + (DIM if kind else 0))

    def forward(self, batch: RoomBatch) -> Tensor:
        """Return the predictions ``[B, T]``."""
        parts = []
        if self._inputs.row is not None:
            row = self._inputs.row
            parts.append(_padded([row[room.positions] for room in batch.rooms]))
        if self._kind:
            parts.append(self._states(batch))
        scores: Tensor = self.head(torch.cat(parts, 2))
        return scores

    def _states(self, batch: RoomBatch) -> Tensor:
        """Return the state of the sequence network after each position ``[B, T, DIM]``."""
        values = self._inputs.sequence
        assert values is not None
        read = _padded(
            [
                np.concatenate(
                    [
                        np.pad(values[room.history], ((0, 0), (0, 1))),
                        np.pad(values[room.positions], ((0, 0), (0, 1)), constant_values=1),
                    ]
                )
                for room in batch.rooms
            ]
        )
        states = self.project(read)
        if self._kind == "gru":
            states = self.network(states)[0]
        else:
            length = states.shape[1]
            states = states + self.places.weight[:length]
            # Padding is at the end, so no position sees it.
            ahead = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
            states = self.network(states, mask=ahead, is_causal=True)
        begin = torch.tensor([len(room.history) for room in batch.rooms])
        place = begin[:, None] + torch.arange(batch.score.shape[1])
        place = place.clamp(max=states.shape[1] - 1)[:, :, None].expand(-1, -1, DIM)
        return states.gather(1, place)


def highlight_loss(predicted: Tensor, score: Tensor, known: Tensor) -> Tensor:
    """Return the loss of a batch, see above; all are ``[B, T]``."""
    error = (predicted - score).square()
    point = error[known].mean()
    pairs = known[:, :, None] & known[:, None] & (score[:, :, None] - score[:, None] > PAIR_DELTA)
    count = pairs.sum((1, 2))
    losses = -functional.logsigmoid(predicted[:, :, None] - predicted[:, None])
    # The mean over the pairs of each room, then over the rooms that have any.
    of_room = losses.where(pairs, losses.new_zeros(())).sum((1, 2)) / count.clamp(min=1)
    pair = of_room.sum() / (count > 0).sum().clamp(min=1)
    steps = ((score[:, 1:] - score[:, :-1]).abs() > BORDER_DELTA) & known[:, 1:]
    amplified = BORDER_GAMMA * steps
    weight = (1 + functional.pad(amplified, (1, 0)) + functional.pad(amplified, (0, 1))) * known
    border = (weight * error).sum() / weight.sum()
    return point + PAIR_WEIGHT * pair + BORDER_WEIGHT * border


def train_and_predict(
    model: Callable[[], nn.Module], rooms: HighlightRooms, training: HighlightTraining
) -> tuple[Predictions, dict[str, float]]:
    """Train a model, and return its predictions for the test rooms, and its best epoch with the mAP of that.

    Args:
        model: makes the model; called after the seed is set.
        rooms: all rooms.
        training: schedule.
    """
    torch.manual_seed(training.seed)
    rng = np.random.default_rng(training.seed)
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), training.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, training.epochs, eta_min=0.01 * training.learning_rate
    )
    trained = rooms.parts[TRAIN]
    length = np.array([len(room) + len(room.history) for room in trained])
    best, state = {"epoch": 0.0, "mAP": -1.0}, deepcopy(network.state_dict())
    for epoch in range(training.epochs):
        network.train()
        # Rooms of about the same length together, so that little is padded.
        order = np.argsort(length * rng.uniform(0.8, 1.25, len(length)))
        starts = rng.permutation(np.arange(0, len(order), BATCH_ROOMS))
        for start in starts:
            batch = RoomBatch.of([trained[one] for one in order[start : start + BATCH_ROOMS]])
            loss = highlight_loss(network(batch), batch.score, batch.known)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
        schedule.step()
        chosen_by = rooms.parts[VALIDATE]
        predictions = predict(network, chosen_by)
        found = float(
            np.nanmean(
                [average_precision(one, room.highlight) for one, room in zip(predictions, chosen_by, strict=True)]
            )
        )
        if found > best["mAP"]:
            best, state = {"epoch": epoch + 1.0, "mAP": found}, deepcopy(network.state_dict())
    network.load_state_dict(state)
    return predict(network, rooms.parts[TEST]), best


@torch.no_grad()
def predict(network: nn.Module, rooms: Sequence[HighlightRoom]) -> Predictions:
    """Return the predictions of a model for some rooms."""
    network.eval()
    found: list[np.ndarray] = [np.empty(0)] * len(rooms)
    order = np.argsort([len(room) + len(room.history) for room in rooms])
    for start in range(0, len(order), BATCH_ROOMS):
        places = order[start : start + BATCH_ROOMS]
        predicted = network(RoomBatch.of([rooms[one] for one in places])).numpy()
        for one, row in zip(places, predicted, strict=True):
            found[one] = row[: len(rooms[one])]
    return found


def _padded(parts: Sequence[np.ndarray]) -> Tensor:
    """Return arrays ``[length, width]`` as one tensor ``[parts, longest, width]``, with zeros at the end."""
    padded = np.zeros((len(parts), max(map(len, parts)), parts[0].shape[1]), np.float32)
    for place, part in enumerate(parts):
        padded[place, : len(part)] = part
    return torch.from_numpy(padded)
