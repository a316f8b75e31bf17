"""What a peer can call up as often as it likes, bugs of ours among it, must not fill the disk with log entries."""

from __future__ import annotations

import logging
import time

_EVERY_S = 60.0


class FailureLog:
    """Logs an exception with its traceback, or a warning, but each kind only once a minute; in between it is a debug
    message."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._silent_until: dict[str, float] = {}  # by message, of which there are as many as topics and protocols

    def exception(self, message: str) -> None:
        """To be called in a handler of the exception; `message` says what failed, and nothing a peer chooses."""
        if self._is_due(message):
            self._log.exception("%s (said once a minute)", message)
        else:
            self._log.debug("%s, again", message)

    def warning(self, message: str, *about: object) -> None:
        """As `Logger.warning`, each `message` once a minute, whatever it is `about`."""
        level = logging.WARNING if self._is_due(message) else logging.DEBUG
        self._log.log(level, message, *about)

    def _is_due(self, message: str) -> bool:
        now = time.monotonic()
        due = now >= self._silent_until.get(message, 0.0)
        if due:
            self._silent_until[message] = now + _EVERY_S
        return due
