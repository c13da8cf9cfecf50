"""Processes of this test session: those of its Ray node, and ports for new ones."""

from __future__ import annotations

import contextlib
import os
import signal
import socket

import psutil


def kill_one(title: str) -> int:
    """SIGKILL one process whose title begins so, as Ray names its actors and tasks; returns how many were killed."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended by now
            if " ".join(process.cmdline()).startswith(title):
                os.kill(process.pid, signal.SIGKILL)
                return 1
    return 0


ENCODER = "ray::ShardEncoder"
"""Title of the actors that encode raw rows."""


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
