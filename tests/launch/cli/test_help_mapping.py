"""The mapping in the help of `limelight data import events` works as it is printed."""

from __future__ import annotations

import textwrap
from pathlib import Path

from launch.cli.data import events
from trainer.data.importers.events import import_events

LOG = """uid,anchor,room,ts,watched_ms,clicked,gift_price
7,70,700,1650000000000,5000,1,0
7,71,701,1650000001000,0,0,2.5
"""


def test_the_mapping_of_the_help_is_accepted(tmp_path: Path) -> None:
    assert events.help is not None
    mapping = events.help.split("\b\n", 1)[1].split("\n\n", 1)[0]
    (tmp_path / "map.toml").write_text(textwrap.dedent(mapping))
    (tmp_path / "log.csv").write_text(LOG)
    spec = import_events(tmp_path / "log.csv", tmp_path / "out", tmp_path / "map.toml", partitions=1)
    assert spec.behaviours == ("click", "gift") and spec.rows == 2
