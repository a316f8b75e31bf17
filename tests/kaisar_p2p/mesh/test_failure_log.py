from __future__ import annotations

import logging

import pytest

from kaisar_p2p.mesh.failure_log import FailureLog


def test_a_warning_about_anybody_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    failures = FailureLog(logging.getLogger("sample"))
    with caplog.at_level(logging.INFO, "sample"):
        for number in range(100):
            failures.warning("stream of %s reset", number)
    assert [record.getMessage() for record in caplog.records] == ["stream of 0 reset"]


def test_a_bug_that_peers_call_up_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    failures = FailureLog(logging.getLogger("sample"))
    with caplog.at_level(logging.INFO, "sample"):
        for message in ["the handler failed"] * 1000 + ["the validator failed"]:
            try:
                raise RuntimeError("a bug")
            except RuntimeError:
                failures.exception(message)
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "the handler failed",
        "the validator failed",
    ]
    assert all(record.exc_info for record in caplog.records)
