"""Connected peers that begin and do not finish: memory has a bound at every layer."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.attack


@pytest.mark.parametrize("layer", ["rpc", "frame", "data", "noise"])
def test_what_is_never_finished(fresh, attack, layer: str) -> None:
    attack("unfinished", layer=layer, peers=20)
