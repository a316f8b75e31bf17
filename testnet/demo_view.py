"""What the demo shows: a live picture on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from protocols.onboarding import REGISTRATION_STEPS

Board = dict[str, dict[int, str]]
"""Provider → step number → what happened."""


class DemoView:
    """Prints to stdout. On a terminal the registration is a table that fills up; elsewhere each step is a line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._started_s = time.monotonic()

    def heading(self, text: str) -> None:
        """A step of the demo begins."""
        seconds = time.monotonic() - self._started_s
        self._console.print(f"[bold cyan]== {escape(text)}[/] [dim]({seconds:.1f} s)[/]", soft_wrap=True)

    def line(self, text: str) -> None:
        """Something that was observed."""
        self._console.print(f"   {escape(text)}", highlight=False, soft_wrap=True)

    def exactly(self, text: str) -> None:
        """A line of its own, letter by letter as given."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def failed(self, title: str, reason: str) -> None:
        """A step was not observed."""
        self._console.print(f"[bold red]!! {escape(title)}: {escape(reason)}[/]", highlight=False, soft_wrap=True)

    @contextmanager
    def registrations(self) -> Iterator[None]:
        """While it lasts, `registration` keeps a live table on a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(_table({}), console=self._console, refresh_per_second=8) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def registration(self, board: Board, provider: str, step: int) -> None:
        """A provider has come to a step."""
        if self._live is not None:
            self._live.update(_table(board))
            return
        name = REGISTRATION_STEPS[step - 1]
        self.line(f"{provider}  {step:2}/{len(REGISTRATION_STEPS)} {name}: {board[provider][step]}")


def _table(board: Board) -> Table:
    """Steps down, providers across; the newest step of each also in words."""
    table = Table(box=None, padding=(0, 2), title_justify="left")
    table.add_column("registration", style="bold")
    for provider in board:
        table.add_column(provider, max_width=34, no_wrap=True, overflow="ellipsis")
    for number, name in enumerate(REGISTRATION_STEPS, start=1):
        cells = [f"[green]✓[/] {escape(steps[number])}" if number in steps else "·" for steps in board.values()]
        table.add_row(f"{number:2} {name}", *cells)
    return table
