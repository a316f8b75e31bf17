from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from kaisar_p2p.errors import PeerUnreachable
from kaisar_p2p.mesh.discovery.racing import Race


def attempt(name: str, after_s: float, *, fails: bool = False, began: list[tuple[str, float]]):
    async def run() -> str:
        began.append((name, round(trio.current_time() - start[0], 2)))
        await trio.sleep(after_s)
        if fails:
            raise OSError(name)
        return name

    start = [trio.current_time()]
    return run


async def test_a_dead_address_costs_a_quarter_of_a_second(autojump_clock: trio.testing.MockClock) -> None:
    began: list[tuple[str, float]] = []
    race = Race([attempt("dead", 100, began=began), attempt("alive", 0.1, began=began)], deadline_s=5)
    began_at = trio.current_time()
    assert await race.winner() == "alive"
    assert trio.current_time() - began_at == pytest.approx(0.35)
    assert began == [("dead", 0.0), ("alive", 0.25)]


async def test_after_a_failure_the_next_begins_at_once(autojump_clock: trio.testing.MockClock) -> None:
    began: list[tuple[str, float]] = []
    race = Race([attempt("refused", 0.01, fails=True, began=began), attempt("alive", 0, began=began)], deadline_s=5)
    assert await race.winner() == "alive"
    assert began == [("refused", 0.0), ("alive", 0.01)]


async def test_all_errors_are_told_in_order(autojump_clock: trio.testing.MockClock) -> None:
    began: list[tuple[str, float]] = []
    attempts = [attempt("slow", 99, began=began), attempt("refused", 0, fails=True, began=began)]
    race = Race(attempts, deadline_s=5)
    began_at = trio.current_time()
    assert await race.winner() is None
    assert trio.current_time() - began_at == pytest.approx(5)
    assert [(number, type(error)) for number, error in race.errors] == [(0, trio.TooSlowError), (1, OSError)]
    assert await Race([], deadline_s=5).winner() is None


async def test_whoever_is_dialed_at_many_addresses_gets_one_connection(lab) -> None:
    a, b = await lab.mesh(target_peers=0), await lab.mesh(target_peers=0)
    refusing = [f"/ip4/127.0.0.1/tcp/{port}" for port in (1, 2, 3)]
    a.add_addresses(b.key, [*b.addrs, *refusing])
    await a._discovery.connect(b.key)
    assert len(a._network.connections_with(b.key)) == 1
    with pytest.raises(PeerUnreachable, match=r"tcp/3.*tcp/2.*tcp/1"):
        stranger = os.urandom(32)
        a.add_addresses(stranger, refusing)
        await a._discovery.connect(stranger)
