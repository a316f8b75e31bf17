"""A flood of gossip is worked off in steps: whoever else has something to do comes in between."""

from __future__ import annotations

import os

import pytest
import trio

from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.mesh.gossip.turns import SHARE, STEP_S, Turns


@pytest.mark.parametrize("readers", [1, 8])
async def test_others_have_their_turn_after_each_step_of_all_readers_together(readers: int) -> None:
    turns, happened, working = Turns(), [], readers

    async def read() -> None:
        nonlocal working
        for _ in range(20):
            await turns.rest()
            happened.append("work")
            if turns.spend(0.6 * STEP_S):
                await turns.rest()
        working -= 1

    async def other() -> None:
        while working:
            happened.append("other")
            await trio.lowlevel.checkpoint()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(readers):
                nursery.start_soon(read)
            nursery.start_soon(other)
    assert happened.count("work") == 20 * readers
    runs = "".join(each[0] for each in happened).split("o")
    assert max(map(len, runs)) <= 4  # two steps may come without a turn of the other between: trio's order is random


async def test_gossip_leaves_most_of_a_core_however_much_of_it_comes(autojump_clock) -> None:
    turns, began, worked_s = Turns(), trio.current_time(), 0.0
    while trio.current_time() - began < 10:
        turns.spend(STEP_S)
        worked_s += STEP_S
        await turns.rest()
    assert worked_s == pytest.approx(10 * SHARE, rel=0.02)


async def test_a_little_work_rests_nowhere() -> None:
    turns = Turns()
    assert not turns.spend(STEP_S / 4)
    with trio.CancelScope() as scope:
        scope.cancel()
        await turns.rest()  # no checkpoint
    assert not scope.cancelled_caught


async def test_empty_rpcs_are_not_for_free(lab) -> None:
    """A megabyte of zeros is a million of them."""
    mesh = await lab.mesh(target_peers=0)
    link = mesh._gossip._outbox._link_for(os.urandom(32), trio.current_time())
    before = link.messages_bucket._tokens
    for rpc in wire.FrameReader(100).feed(bytes(400)):
        await mesh._gossip._on_rpc(os.urandom(32), link, rpc, 0.0)
    assert before - link.messages_bucket._tokens > 90
