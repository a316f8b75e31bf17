"""The result of one check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from kaisar_p2p.errors import KaisarError

Grade = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check found (`text`), and what to do about it (`hint`, empty when there is nothing to do)."""

    check: str
    grade: Grade
    text: str
    hint: str = ""


class Findings(list[Finding]):
    """Findings in the order of the checks."""

    def ok(self, check: str, text: str, hint: str = "") -> None:
        """All is well."""
        self.append(Finding(check, "ok", text, hint))

    def warn(self, check: str, text: str, hint: str = "") -> None:
        """The node works, but not as it could."""
        self.append(Finding(check, "warn", text, hint))

    def fail(self, check: str, text: str, hint: str = "") -> None:
        """The node does not work, or not in its role."""
        self.append(Finding(check, "fail", text, hint))

    @contextmanager
    def failing(self, check: str) -> Iterator[None]:
        """An error inside is a failure of this check."""
        try:
            yield
        except KaisarError as error:
            self.fail(check, error.message, error.hint)
        except OSError as error:
            self.fail(check, f"the system refuses: {error}", "check free space and rights")
