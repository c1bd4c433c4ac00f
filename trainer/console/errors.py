"""The one exception for mistakes a user can make, how others are told, and how the loss of another rank is known."""

from __future__ import annotations

import re


class UserError(Exception):
    """A mistake of the user's, told in one line: what, where, and what would be accepted.

    Commands print it as ``limelight: error: <message>`` and exit with status 2; nothing else is printed.
    """


def one_line(error: BaseException) -> str:
    """What went wrong, for a person."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if "inline_container" in text and "unexpected pos" in text:
        # What torch makes of a write that failed; the reason is lost where the error comes from another rank.
        return "a file could not be written whole; is the disk full, or a quota used up?"
    return f"{type(error).__name__}: {text}"


_LOST_PEER = re.compile(r"\bgloo/|\bNCCL\b|\bDist(Backend|Network|Store)Error\b")


def is_lost_peer(message: str) -> bool:
    """Whether an exception, told as ``type: message``, is what a rank meets when another one has gone.

    gloo and NCCL know no type for it.
    """
    return _LOST_PEER.search(message) is not None
