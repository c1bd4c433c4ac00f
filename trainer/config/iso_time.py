"""Accepted forms of times as text: one grammar for job files, command lines, logs and candidates."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

ISO_TIME = (
    r"^(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[Tt ](?P<hour>[0-9]{2})(?::?(?P<minute>[0-9]{2})(?::?(?P<second>[0-9]{2})(?:\.(?P<fraction>[0-9]{1,9}))?)?)?"
    r" ?(?P<offset>Z|z|UTC|(?P<sign>[+-])(?P<offset_hour>[0-9]{2})(?::?(?P<offset_minute>[0-9]{2}))?)?)?$"
)
"""Regular expression of a time, for Python and for Arrow (RE2); ``read_iso`` and ``times_ms`` check the numbers."""

ISO_FORMS = (
    "2022-05-04 or 2022-05-04T12:30:05.123 (T, t or a space; up to nine decimals; then nothing, Z, z, UTC, +08, +0800 "
    "or +08:00)"
)
"""Description of the accepted forms, for messages."""


def read_iso(text: str, zone: str) -> int | None:
    """Return milliseconds UTC of a time as text, or None if it has no accepted form.

    Fractions of a millisecond are cut off.

    Args:
        text: the time.
        zone: IANA time zone of a time without an offset.
    """
    found = re.match(ISO_TIME, text)
    if found is None or text.endswith("\n"):
        return None
    try:
        clock = [int(found[name] or 0) for name in ("hour", "minute", "second")]
        moment = datetime.fromisoformat(found["date"]).replace(hour=clock[0], minute=clock[1], second=clock[2])
        if found["offset"] is None:
            moment = moment.replace(tzinfo=ZoneInfo(zone))
        else:
            hours, minutes = int(found["offset_hour"] or 0), int(found["offset_minute"] or 0)
            if hours > 23 or minutes > 59:
                return None
            east = timedelta(hours=hours, minutes=minutes)
            moment = moment.replace(tzinfo=timezone(-east if found["sign"] == "-" else east))
        seconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    except (ValueError, OverflowError):
        return None
    return seconds * 1000 + int(((found["fraction"] or "") + "000")[:3])


def time_text(time_ms: int, zone: str) -> str:
    """Return a time in milliseconds UTC as ISO text in a time zone, for messages."""
    try:
        moment = datetime.fromtimestamp(time_ms / 1000, UTC).astimezone(ZoneInfo(zone))
    except (OverflowError, ValueError, OSError):
        return f"{time_ms} ms since 1970"
    return moment.isoformat(timespec="milliseconds")
