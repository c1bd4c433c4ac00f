"""Listening socket of the rendezvous store, which the launcher opens and the first rank inherits.

A port that is chosen first and opened by a rank seconds later can be taken in between. The launcher therefore keeps the
socket open, and the first rank serves the store on it. Imports no torch, so that the launcher starts at once.
"""

from __future__ import annotations

import socket

STORE_SOCKET_VARIABLE = "LIMELIGHT_STORE_SOCKET"
"""Environment variable of the ranks: file descriptor, in the first rank, of the store's listening socket."""

BACKLOG = 1024
"""Connections that may wait while the first rank still imports its libraries."""


def open_store_socket(port: int = 0) -> socket.socket:
    """Return a socket that listens on ``port`` of the loopback interface; 0 takes a port that nothing uses.

    Raises:
        OSError: the port is in use, or this user may not open it.
    """
    listener = socket.socket()
    try:
        # A port in TIME_WAIT after an earlier job is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
