"""`kaisar doctor`."""

from __future__ import annotations

from node.commands.options import AsJson, DataDir, data_directory


def doctor(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Look for what keeps this node from working, and say what to do about it. It may run or not.

    Example: kaisar doctor
    """
    data_directory(data_dir)
