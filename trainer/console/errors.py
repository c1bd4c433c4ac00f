"""The exception for mistakes of a user, one-line texts of other exceptions, and detection of a lost rank."""

from __future__ import annotations

import re


class UserError(Exception):
    """A mistake of the user, with a message of one line: what, where, and what would be accepted.

    Commands print it as ``limelight: error: <message>`` and exit with status 2; nothing else is printed.
    """


def one_line(error: BaseException) -> str:
    """Format an exception as one line for a person."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if "inline_container" in text and "unexpected pos" in text:
        # torch reports a failed write so; the operating system's reason is lost if it comes from another rank.
        return "a file could not be written whole; is the disk full, or a quota used up?"
    return f"{type(error).__name__}: {text}"


_LOST_PEER = re.compile(r"\bgloo/|\bNCCL\b|\bDist(Backend|Network|Store)Error\b")


def is_lost_peer(message: str) -> bool:
    """True if an exception, given as ``type: message``, means that another rank's process ended.

    gloo and NCCL have no exception type for it.
    """
    return _LOST_PEER.search(message) is not None
