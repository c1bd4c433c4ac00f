"""The picture of a room: readable labels for few and for many codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.semantic_ids import room_timeline
from trainer.semantic_ids.room_timeline import MOST_ROWS, draw_room

BEHAVIOURS = ("click", "effective_view", "long_view", "like", "comment", "gift", "follow", "share")


def document(codes: int, segments: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rates = {name: {"carries": "more" if place % 2 else None} for place, name in enumerate(BEHAVIOURS)}
    return {
        "version": f"{codes}-abcdef01",
        "timezone": "Asia/Shanghai",
        "behaviours": {name: {} for name in BEHAVIOURS},
        "codes": [{"code": [code], "topics": {"a long topic": 1.0}, "behaviours": rates} for code in range(codes)],
        "room": {
            "item_id": 123_456,
            "author_id": 7,
            "start_ms": 1_709_510_400_000,
            "segments": [
                {
                    "start_ms": 1_709_510_400_000 + 30_000 * place,
                    "code": None if place == 5 else [place % codes],
                    "topic": None,
                    "text": "words",
                    "watch_ms": float(rng.integers(0, 60_000)),
                    "events": {name: float(rng.poisson(0.3)) for name in BEHAVIOURS},
                }
                for place in range(segments)
            ],
        },
    }


@pytest.mark.parametrize(("codes", "segments"), [(1, 1), (3, 120), (200, 2000)])
def test_no_label_covers_another(codes: int, segments: int, tmp_path: Path) -> None:
    figures: list[Figure] = []

    def keep(*arguments: Any, **options: Any) -> Figure:
        figures.append(Figure(*arguments, **options))
        return figures[-1]

    with patch.object(room_timeline, "Figure", keep):
        draw_room(document(codes, segments), tmp_path / "room.png")
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    whole = figure.bbox
    texts = [figure._suptitle]
    for axes in figure.axes:
        labels = [*axes.get_yticklabels(), axes.yaxis.label, axes.xaxis.label]
        # The panels share the axis of time; only the last one shows it.
        labels += axes.get_xticklabels() if axes is figure.axes[-1] else []
        texts += [label for label in labels if label.get_visible() and label.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts if text is not None]
    inside = [box for box in boxes if box.x1 > 0 and box.width > 0]
    assert len(figure.axes[0].get_yticklabels()) == min(codes + (segments > 5), MOST_ROWS + 1)
    for place, box in enumerate(inside):
        assert whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 15 and box.y0 >= whole.y0 - 1 and box.y1 <= whole.y1 + 1
        for other in inside[place + 1 :]:
            assert not box.overlaps(other), (box, other)
    assert (tmp_path / "room.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["room.png"]
