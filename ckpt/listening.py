# SPDX-License-Identifier: Apache-2.0
"""Accepting connections for as long as the process lives, whatever comes in."""

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from .threads import NoThreadError, start_thread

_PAUSE = timedelta(milliseconds=100)


def accept_forever(listener: socket.socket, serve: Callable[..., None]) -> None:
    """Call `serve(socket, address)` in a thread for each connection.

    Where descriptors or threads have run out, callers wait or are turned away until there are some again: a process
    that stopped listening would hold memory that nobody can reach. Returns when the listener has been closed.
    """
    while True:
        try:
            sock, address = listener.accept()
        except OSError:
            if listener.fileno() < 0:
                return
            time.sleep(_PAUSE.total_seconds())
            continue
        _serve_in_thread(sock, address, serve)


def _serve_in_thread(sock: socket.socket, address: Any, serve: Callable[..., None]) -> None:
    try:
        start_thread(serve, sock, address)
    except NoThreadError:
        sock.close()
        time.sleep(_PAUSE.total_seconds())
