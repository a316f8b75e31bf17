"""Lanes keep their order and bounds; the driver wakes machines, isolates their mistakes and journals before it acts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from node.driver import Driver
from node.inbox import RULES, Inbox, Lane
from protocols.actions import Action, Event, Note, RequestEnded, Wake


def event(n: int) -> Event:
    return RequestEnded(str(n), "")


@given(st.lists(st.sampled_from(Lane), max_size=60))
def test_lanes_are_served_in_order_and_each_in_order_of_arrival(lanes: list[Lane]) -> None:
    inbox = Inbox()
    for n, lane in enumerate(lanes):
        assert inbox.put(lane, event(n))
    expected = [event(n) for lane in Lane for n, other in enumerate(lanes) if other is lane]
    got = []
    while (item := inbox.get_nowait()) is not None:
        got.append(item)
    assert got == expected


@pytest.mark.parametrize("lane", list(Lane))
def test_a_full_lane_follows_its_rule_and_counts_what_it_drops(lane: Lane) -> None:
    inbox, rule = Inbox(), RULES[lane]
    results = [inbox.put(lane, event(n)) for n in range(rule.length + 3)]
    assert inbox.depths()[lane.name.lower()] == rule.length
    assert inbox.dropped[lane.name.lower()] == 3
    first = inbox.get_nowait()
    assert results[-1] is rule.newest_wins
    assert first == event(3 if rule.newest_wins else 0)


async def test_a_flood_of_adverts_does_not_delay_a_certificate() -> None:
    inbox = Inbox()
    for n in range(5000):
        inbox.put(Lane.ADVERT, event(n))
    inbox.put(Lane.CERTIFICATE, event(-1))
    assert await inbox.get() == event(-1)


async def test_a_patient_producer_waits_for_room(autojump_clock: trio.testing.MockClock) -> None:
    inbox = Inbox()
    length = RULES[Lane.BLOCK].length
    async with trio.open_nursery() as nursery:

        async def produce() -> None:
            for n in range(length + 10):
                await inbox.put_patiently(Lane.BLOCK, event(n))

        nursery.start_soon(produce)
        for n in range(length + 10):
            assert await inbox.get() == event(n)
    assert not inbox.dropped


class FakeClock:
    def now(self) -> float:
        return trio.current_time()


class Recorder:
    def __init__(self) -> None:
        self.performed: list[tuple[float, list[Action]]] = []

    async def perform(self, actions: list[Action], now: float) -> None:
        self.performed.append((now, actions))
        await trio.lowlevel.checkpoint()


class Alarm:
    """Wants to be woken every 10 s, three times."""

    def __init__(self, start: float) -> None:
        self.deadline: float | None = start + 10
        self.wakes: list[float] = []

    def step(self, event: Event, now: float) -> list[Action]:
        if isinstance(event, Wake):
            self.wakes.append(now)
            self.deadline = now + 10 if len(self.wakes) < 3 else None
        return [Note(type(event).__name__)]


class Broken:
    deadline = None

    def step(self, event: Event, now: float) -> list[Action]:
        raise RuntimeError("a mistake")


async def test_the_driver_wakes_on_time_and_survives_a_broken_machine(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    start = trio.current_time()
    alarm, effects, inbox = Alarm(start), Recorder(), Inbox()
    driver = Driver([Broken(), alarm], inbox, effects, FakeClock())  # type: ignore[arg-type,list-item]
    with caplog.at_level(logging.ERROR), trio.move_on_after(60):
        inbox.put(Lane.RESULT, event(1))
        await driver.run()
    assert [round(at - start) for at in alarm.wakes] == [10, 20, 30]
    assert [action.kind for _, actions in effects.performed for action in actions] == [  # type: ignore[union-attr]
        "RequestEnded",
        "Wake",
        "Wake",
        "Wake",
    ]
    assert "Broken failed on RequestEnded" in caplog.text
