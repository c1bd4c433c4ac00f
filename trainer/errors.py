"""The one exception for mistakes a user can make, and how the loss of another rank is known."""

from __future__ import annotations

import re


class UserError(Exception):
    """A mistake of the user's, told in one line: what, where, and what would be accepted.

    Commands print it as ``limelight: error: <message>`` and exit with status 2; nothing else is printed.
    """


_LOST_PEER = re.compile(r"\bgloo/|\bNCCL\b|\bDist(Backend|Network|Store)Error\b")


def is_lost_peer(message: str) -> bool:
    """Whether an exception, told as ``type: message``, is what a rank meets when another one has gone.

    gloo and NCCL know no type for it.
    """
    return _LOST_PEER.search(message) is not None
