"""What nurseries raise reaches those who catch it."""

from __future__ import annotations

import pytest

from kaisar_p2p.errors import KaisarError, LedgerError, MeshError, ungrouped


def test_the_only_error_leaves_nested_groups_as_itself_with_its_cause() -> None:
    cause, error = OSError("taken"), MeshError("no port")
    error.__cause__ = cause
    with pytest.raises(MeshError) as raised, ungrouped():
        raise BaseExceptionGroup("", [BaseExceptionGroup("", [error])])
    assert raised.value is error and raised.value.__cause__ is cause


def test_several_errors_stay_a_group() -> None:
    group = ExceptionGroup("", [MeshError("one"), LedgerError("other")])
    with pytest.raises(ExceptionGroup) as raised, ungrouped():
        raise group
    assert raised.value.exceptions == group.exceptions


def test_what_is_no_group_passes() -> None:
    with pytest.raises(KaisarError, match="plain"), ungrouped():
        raise KaisarError("plain")
