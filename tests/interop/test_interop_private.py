"""Private swarms with js-libp2p: the same pre-shared key lets both in, another one neither.

The Go daemon has no option for a key.
"""

from __future__ import annotations

import pytest
import trio

from benchmarks.peers.interface import PeerFailed, digest_of
from tests.interop.conftest import Lab, eventually

pytestmark = pytest.mark.interop

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
SIZE = 4_000_000
WITHIN_S = 1.5  # a second, and something for a busy machine


@pytest.mark.parametrize("we_dial", [True, False], ids=["we dial", "they dial"])
async def test_members_talk(lab: Lab, js: str, we_dial: bool) -> None:
    ours, foreign = await lab.ours(pre_shared_key=KEY), await lab.foreign(js, pre_shared_key=KEY)
    dialer, listener = (ours, foreign) if we_dial else (foreign, ours)
    await dialer.dial(listener.addrs[0])
    assert await ours.digest(foreign.key, SIZE, 65536) == digest_of(SIZE)
    assert await foreign.digest(ours.key, SIZE, 65536) == digest_of(SIZE)
    assert (await foreign.identify(ours.key))["key"] == ours.key


@pytest.mark.parametrize(
    ("our_key", "their_key", "says"),
    [
        (KEY, OTHER_KEY, "another pre-shared key"),
        (KEY, None, "had no pre-shared key"),
        (None, KEY, "a pre-shared key and ours has none"),
    ],
    ids=["another", "only we", "only they"],
)
async def test_we_cannot_join_and_hear_why(lab: Lab, js: str, our_key, their_key, says: str) -> None:
    ours, foreign = await lab.ours(pre_shared_key=our_key), await lab.foreign(js, pre_shared_key=their_key)
    with trio.fail_after(WITHIN_S), pytest.raises(PeerFailed, match=says):
        await ours.dial(foreign.addrs[0])
    assert await ours.peers() == []


@pytest.mark.parametrize("their_key", [OTHER_KEY, None], ids=["another", "none"])
async def test_they_cannot_join(lab: Lab, js: str, their_key) -> None:
    ours, foreign = await lab.ours(pre_shared_key=KEY), await lab.foreign(js, pre_shared_key=their_key)
    with pytest.raises(PeerFailed):
        await foreign.dial(ours.addrs[0])

    async def counted() -> bool:
        return "pre-shared key" in ours.mesh.statistics().refused

    await eventually(counted)
    assert await ours.peers() == []
