"""Who may connect and who makes room, without IO."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.guard.admission import Door, Origin, Standing, Visitor, gives_way, origin_of, worst_of
from kaisar_p2p.mesh.limits import MeshLimits, SharedBytes
from kaisar_p2p.mesh.transport.yamux_stream import ReceivedBytes

IDLE_S = 300.0
LIMITS = MeshLimits(
    handshakes=8, handshakes_per_address=3, connections_per_address=5, connections_per_subnet=7, handshakes_per_s=1000
)


def public(last: int, third: int = 0) -> Origin:
    return origin_of(f"8.8.{third}.{last}")


class Inn:
    """A door, and everybody who went through it."""

    def __init__(self, limits: MeshLimits = LIMITS) -> None:
        self.door, self.now, self.expelled = Door(limits), 0.0, []

    def enter(self, origin: Origin) -> Visitor | str:
        reason = self.door.refusal(origin, self.now)
        if reason is not None:
            return reason
        visitor = self.door.enter(origin, self.now, lambda: self.expelled.append(visitor))
        return visitor


@pytest.mark.parametrize(
    ("host", "account", "subnet", "private"),
    [
        ("8.8.8.8", "8.8.8.8/32", "8.8.8.0/24", False),
        ("10.1.2.3", "10.1.2.3/32", "10.1.2.0/24", True),
        ("127.0.0.1", "127.0.0.1/32", "127.0.0.0/24", True),
        ("::ffff:8.8.8.8", "8.8.8.8/32", "8.8.8.0/24", False),
        ("2a00:1450:4001:82b::200e", "2a00:1450:4001:82b::/64", "2a00:1450:4001:800::/56", False),
        ("fe80::1%eth0", "fe80::/64", "fe80::/56", True),
        ("", "", "", False),
    ],
)
def test_where_a_connection_comes_from(host: str, account: str, subnet: str, private: bool) -> None:
    assert origin_of(host) == Origin(account, subnet, private)


@given(st.text(max_size=100))
def test_any_text_is_an_origin(host: str) -> None:
    assert len(origin_of(host).account) <= 64


def test_one_address_has_its_share_of_handshakes_and_connections() -> None:
    inn = Inn()
    visitors = [inn.enter(public(1)) for _ in range(3)]
    assert inn.enter(public(1)) == "handshakes"
    assert isinstance(inn.enter(public(2, third=9)), Visitor)
    for visitor in visitors:
        inn.door.authenticated(visitor)
    inn.door.authenticated(inn.enter(public(1)))
    inn.door.authenticated(inn.enter(public(1)))
    assert inn.enter(public(1)) == "address"
    inn.door.leave(visitors[0])
    assert isinstance(inn.enter(public(1)), Visitor)


def test_a_subnet_has_its_share() -> None:
    inn = Inn()
    for last in range(7):
        inn.door.authenticated(inn.enter(public(last)))
    assert inn.enter(public(77)) == "subnet"
    assert isinstance(inn.enter(public(77, third=1)), Visitor)


def test_private_addresses_have_more_unless_they_are_to_be_as_others() -> None:
    near = origin_of("127.0.0.1")
    inn = Inn()
    for _ in range(40):
        inn.door.authenticated(inn.enter(near))
    assert inn.enter(near) == "address"
    strict = Inn(MeshLimits(connections_per_address=1, private_factor=1))
    strict.door.authenticated(strict.enter(near))
    assert strict.enter(near) == "address"
    assert inn.door.crowd(near) == 0
    assert strict.door.crowd(near) == 1


def test_the_rate_of_handshakes_is_that_of_the_address() -> None:
    inn = Inn(MeshLimits(handshakes_per_s=2))
    for _ in range(10):
        inn.door.leave(inn.enter(public(1)))
    assert inn.enter(public(1)) == "rate"
    assert isinstance(inn.enter(public(2)), Visitor)
    inn.now += 0.5
    assert isinstance(inn.enter(public(1)), Visitor)


def test_when_all_handshakes_are_taken_the_greediest_address_loses_its_oldest() -> None:
    inn = Inn()
    crowd = [inn.enter(public(last, third=last)) for last in (1, 1, 1, 2, 2, 2, 3, 3)]
    assert inn.enter(public(9, third=9)) == "handshakes"  # all of them have just come
    inn.now += 2.0
    assert isinstance(inn.enter(public(9, third=9)), Visitor)
    assert inn.expelled == [crowd[0]]
    assert inn.door.half_open == 8
    inn.door.leave(crowd[0])
    assert inn.door.half_open == 8


@given(st.lists(st.tuples(st.sampled_from(["enter", "authenticated", "leave"]), st.integers(0, 5), st.floats(0, 3))))
def test_the_door_counts_right_whatever_happens(steps: list[tuple[str, int, float]]) -> None:
    inn, inside = Inn(), []
    for action, number, passed in steps:
        inn.now += passed
        if action == "enter":
            visitor = inn.enter(public(number, third=number % 2))
            if isinstance(visitor, Visitor):
                inside.append(visitor)
        elif inside:
            visitor = inside[number % len(inside)]
            getattr(inn.door, action)(visitor)
            if action == "leave":
                inside.remove(visitor)
        assert inn.door.half_open == sum(visitor.half_open for visitor in inside) <= LIMITS.handshakes
        assert inn.door.inside == len(inside)
    for visitor in inside:
        inn.door.leave(visitor)
    assert inn.door.inside == inn.door.half_open == 0
    assert not inn.door._of_subnet
    assert not inn.door._half_open_of


# -- who makes room ---------------------------------------------------------------------------------------------------

STANDINGS = st.builds(
    Standing,
    kept=st.booleans(),
    busy=st.booleans(),
    blame=st.floats(0, 200),
    useful_s=st.floats(0, 1000),
    crowd=st.integers(0, 10),
    age_s=st.floats(0, 1000),
)


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (Standing(blame=50, age_s=900), Standing(age_s=1)),
        (Standing(useful_s=400, age_s=900), Standing(age_s=1)),
        (Standing(crowd=9, age_s=900), Standing(crowd=1)),
        (Standing(age_s=1), Standing(age_s=900)),
        (Standing(), Standing(busy=True, blame=90, useful_s=900, crowd=9)),
        (Standing(busy=True), Standing(kept=True, blame=99)),
    ],
)
def test_the_worst_goes_first(worse: Standing, better: Standing) -> None:
    assert worst_of(enumerate([better, worse]), IDLE_S) == 1
    assert worst_of(enumerate([worse, better]), IDLE_S) == 0


@given(st.lists(STANDINGS, max_size=20))
def test_who_is_kept_never_goes_and_who_is_busy_only_among_the_busy(standings: list[Standing]) -> None:
    chosen = worst_of(enumerate(standings), IDLE_S)
    open_to_it = [standing for standing in standings if not standing.kept]
    if chosen is None:
        assert not open_to_it
    else:
        assert standings[chosen] in open_to_it
        assert not standings[chosen].busy or all(standing.busy for standing in open_to_it)


@pytest.mark.parametrize(
    ("worst", "newcomer", "reason"),
    [
        (Standing(age_s=1), Standing(), None),
        (Standing(blame=30), Standing(), "blame"),
        (Standing(blame=30), Standing(blame=25), None),
        (Standing(useful_s=301), Standing(), "idle"),
        (Standing(useful_s=301), Standing(blame=30), None),
        (Standing(crowd=5), Standing(crowd=2), "crowd"),
        (Standing(crowd=5), Standing(crowd=5), None),
        (Standing(useful_s=999, busy=True), Standing(), None),
        (Standing(busy=True), Standing(kept=True), "kept"),
        (Standing(kept=True, blame=99), Standing(kept=True), None),
    ],
)
def test_only_a_better_newcomer_takes_a_place(worst: Standing, newcomer: Standing, reason: str | None) -> None:
    assert gives_way(worst, newcomer, IDLE_S) == reason


@given(STANDINGS, STANDINGS)
def test_two_peers_never_take_each_others_place_in_turns(one: Standing, other: Standing) -> None:
    """Whoever gave way comes back as a newcomer, and meets one that has just come too."""
    fresh = [Standing(kept=each.kept, blame=each.blame, crowd=each.crowd) for each in (one, other)]
    assert not (gives_way(fresh[0], fresh[1], IDLE_S) and gives_way(fresh[1], fresh[0], IDLE_S))


# -- memory ----------------------------------------------------------------------------------------------------


def test_small_backlogs_go_when_memory_runs_very_short() -> None:
    memory = ReceivedBytes(1000)
    for held, large, small, tiny in (
        (1000, False, False, False),
        (1001, True, False, False),
        (2001, True, True, False),
    ):
        memory.held = held
        assert (memory.to_blame(70_000), memory.to_blame(60_000), memory.to_blame(4000)) == (large, small, tiny)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(1, 40)), max_size=60))
def test_shared_bytes_are_never_exceeded_and_all_come_back(wanted: list[tuple[bytes, int]]) -> None:
    store, taken = SharedBytes(80), []
    for holder, amount in wanted:
        if store.try_take(holder, amount):
            taken.append((holder, amount))
        mine = [size for who, size in taken if who == holder]
        assert store.total == sum(size for _, size in taken) <= 80
        assert len(mine) <= 1 or sum(mine) <= 10
    for holder, amount in taken:
        store.give_back(holder, amount)
    assert store.total == 0
    assert not store._held
