from __future__ import annotations

import pytest
import trio

from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.transport.keepalive import Keeper, Liveness

_KEEPALIVE_S = MeshLimits().keepalive_s


class Peer:
    """A connection; `answers` says until when its peer reacts to pings, and `talks` until when it talks by itself."""

    def __init__(self, *, answers: float = 0.0, talks: float = 0.0, impatient: bool = False) -> None:
        self.liveness = Liveness(_KEEPALIVE_S, 30.0)
        self.liveness.impatient = impatient
        self.liveness.begin(trio.current_time())
        self.last_received = trio.current_time()
        self.answers, self.talks = answers, talks
        self.pings: list[float] = []
        self.dead: tuple[float, str] | None = None
        self.tend_at = 0.0
        self.fails = self.aborted = False

    def abort(self) -> None:
        self.aborted = True

    def tend(self, now: float) -> None:
        assert not self.fails, "a bug"
        if now < self.talks:
            self.last_received = now
        reason = self.liveness.look(now, self.last_received)
        if reason is not None:
            self.dead = self.dead or (now, reason)
            return
        ping = self.liveness.ping_due(now, self.last_received)
        if ping is not None:
            self.pings.append(now)
            if now < self.answers:
                self.last_received = now
                self.liveness.on_pong(ping, now + 0.05)
        self.tend_at = self.liveness.next_look(now, self.last_received)


@pytest.fixture
async def keeper():
    keeper = Keeper(_KEEPALIVE_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        yield keeper
        nursery.cancel_scope.cancel()


async def test_a_stopped_peer_is_found_within_30_s(keeper: Keeper, autojump_clock) -> None:
    peer = Peer()
    keeper.add(peer)
    began = trio.current_time()
    await trio.sleep(31)
    assert peer.dead is not None
    assert 1.7 * _KEEPALIVE_S < peer.dead[0] - began <= 30.1
    assert "silent" in peer.dead[1]


async def test_a_silent_peer_that_answers_lives_and_is_pinged_seldom(keeper: Keeper, autojump_clock) -> None:
    peer = Peer(answers=1e9)
    keeper.add(peer)
    await trio.sleep(1200)
    assert peer.dead is None
    assert 1200 / _KEEPALIVE_S - 20 <= len(peer.pings) <= 1200 / _KEEPALIVE_S + 1
    assert peer.liveness.rtt_s == pytest.approx(0.05)


async def test_a_peer_that_talks_is_hardly_pinged(keeper: Keeper, autojump_clock) -> None:
    peer = Peer(talks=1e9, answers=1e9)
    keeper.add(peer)
    await trio.sleep(1200)
    assert 1 <= len(peer.pings) <= 1200 / _KEEPALIVE_S / 3


async def test_a_peer_that_does_not_take_what_we_send_is_given_up(keeper: Keeper, autojump_clock) -> None:
    peer = Peer(talks=1e9)
    keeper.add(peer)
    peer.liveness.write_began = trio.current_time()
    await trio.sleep(29)
    assert peer.dead is None
    await trio.sleep(4)
    assert peer.dead is not None


@pytest.mark.parametrize(("impatient", "pings"), [(True, 1), (False, 0)])
async def test_over_a_relay_what_is_not_answered_is_soon_doubtful(
    keeper: Keeper, autojump_clock, impatient: bool, pings: int
) -> None:
    peer = Peer(impatient=impatient, answers=trio.current_time() + 1)
    peer.liveness.on_pong(peer.liveness.ping_due(trio.current_time(), 0.0), trio.current_time())
    keeper.add(peer)
    await trio.sleep(1)
    sent = peer.liveness.unanswered_since = trio.current_time()
    await trio.sleep(5)
    assert [at for at in peer.pings if at <= sent + 1 + _KEEPALIVE_S / 10] == peer.pings
    assert len(peer.pings) == pings
    assert peer.liveness.is_doubtful(trio.current_time(), peer.last_received) is impatient
    assert peer.dead is None
    peer.last_received = trio.current_time()
    assert not peer.liveness.is_doubtful(trio.current_time(), peer.last_received)


async def test_whoever_left_is_not_looked_at(keeper: Keeper, autojump_clock) -> None:
    peer = Peer()
    keeper.add(peer)
    keeper.discard(peer)
    keeper.discard(peer)
    await trio.sleep(100)
    assert not peer.pings


async def test_after_our_own_pause_peers_have_time_to_answer(autojump_clock) -> None:
    """Asleep for an hour, as a laptop: the peers' silence was ours."""
    peer = Peer()
    now = trio.current_time()
    assert peer.liveness.look(now + 3600, now) is None
    assert peer.liveness.ping_due(now + 3600, now) is not None
    assert peer.liveness.look(now + 3604, now) is None
    for tick in range(4, 20):
        reason = peer.liveness.look(now + 3600 + tick, now)
    assert reason is not None


async def test_a_bug_of_ours_costs_one_connection(keeper: Keeper, autojump_clock, caplog) -> None:
    broken, sound = Peer(), Peer(answers=1000)
    broken.fails = True
    keeper.add(broken)
    keeper.add(sound)
    await trio.sleep(3 * _KEEPALIVE_S)
    assert broken.aborted
    assert "could not be looked after" in caplog.text
    assert sound.pings and sound.dead is None and not sound.aborted
