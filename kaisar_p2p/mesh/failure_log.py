"""Bugs of ours that a peer can call up as often as it likes must not fill the disk with their tracebacks."""

from __future__ import annotations

import logging
import time

_EVERY_S = 60.0


class FailureLog:
    """Logs an exception with its traceback, but each kind only once a minute; in between it is a debug message."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._silent_until: dict[str, float] = {}  # by message, of which there are as many as topics and protocols

    def exception(self, message: str) -> None:
        """To be called in a handler of the exception; `message` says what failed, and nothing a peer chooses."""
        now = time.monotonic()
        if now < self._silent_until.get(message, 0.0):
            self._log.debug("%s, again", message)
            return
        self._silent_until[message] = now + _EVERY_S
        self._log.exception("%s (said once a minute)", message)
