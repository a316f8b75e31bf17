"""The rules of reachability: what a minority of liars cannot do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.discovery.addresses import Address
from kaisar_p2p.mesh.reach.reachability import (
    CLEAR_VOTES,
    CONFIRMED,
    OBSERVERS,
    STATEMENT_S,
    ObservedAddresses,
    PeerClocks,
    Round,
    Verdicts,
    host_of,
    is_public,
    voice_of,
)

OURS = "198.18.0.1"
AT = Address("ip4", "8.8.4.4", 4001)


def voice(n: int) -> bytes:
    return n.to_bytes(2, "big")


def round_of(yes: int, no: int, at: Address = AT) -> Round:
    return Round({voice(n): {at} for n in range(yes)}, {voice(1000 + n) for n in range(no)})


# -- voices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("fe80::1%eth0", "fe80::1"),
        ("2001:DB8::0:1", "2001:db8::1"),
    ],
)
def test_a_host_has_one_form(text: str, plain: str) -> None:
    assert host_of(text) == plain


@pytest.mark.parametrize(
    "host", ["10.1.2.3", "127.0.0.1", "100.64.1.1", "::1", "fe80::1%eth0", "192.168.1.1", "", "no address"]
)
def test_a_private_address_is_not_public(host: str) -> None:
    assert not is_public(host)


def test_one_network_has_one_voice_however_many_peers_it_has() -> None:
    keys = [bytes([n]) * 32 for n in range(9)]
    assert len({voice_of(f"8.8.{n}.1", key) for n, key in enumerate(keys)}) == 1
    assert len({voice_of(f"2a00:1450:{n}::1", key) for n, key in enumerate(keys)}) == 1
    assert len({voice_of(f"8.{n}.0.1", key) for n, key in enumerate(keys)}) == 9
    assert len({voice_of("127.0.0.1", key) for key in keys}) == 9  # in a lab, a peer counts by its key


# -- observed addresses -----------------------------------------------------------------------------------------------


def test_one_observer_is_not_believed() -> None:
    observed = ObservedAddresses()
    for _ in range(100):
        observed.note(b"a", OURS, 0)
    assert observed.agreed(0) == ()
    observed.note(b"b", OURS, 0)
    assert observed.agreed(0) == (OURS,)


@given(honest=st.integers(2, 20), liars=st.lists(st.ip_addresses(v=4).map(str), max_size=20), data=st.data())
def test_a_minority_of_liars_cannot_set_our_address(honest: int, liars: list[str], data: st.DataObject) -> None:
    liars = liars[: honest - 1]
    said = [(voice(n), OURS) for n in range(honest)] + [(voice(500 + n), host) for n, host in enumerate(liars)]
    observed = ObservedAddresses()
    for who, host in data.draw(st.permutations(said)):
        observed.note(who, host, 0)
    assert observed.agreed(0) in ((OURS,), ())
    if len(said) <= OBSERVERS:
        assert observed.agreed(0) == (OURS,)


@given(st.lists(st.tuples(st.integers(0, 200), st.ip_addresses().map(str)), max_size=200))
def test_what_is_said_is_bounded(said: list[tuple[int, str]]) -> None:
    observed = ObservedAddresses()
    for who, host in said:
        observed.note(voice(who), host, 0)
    assert len(observed._said) <= OBSERVERS
    assert len(observed.agreed(0)) <= 2


def test_each_family_is_agreed_on_by_itself_and_forgotten_in_time() -> None:
    observed = ObservedAddresses()
    for who in (b"a", b"b"):
        observed.note(who, "2001:4860::1", 0)
        observed.note(who, "9.9.9.9", 10)
    assert observed.agreed(10) == ("9.9.9.9", "2001:4860::1")
    assert observed.agreed(STATEMENT_S + 5) == ("9.9.9.9",)
    observed.forget()
    assert observed.agreed(10) == ()


def test_whether_ports_are_kept_is_told_by_most() -> None:
    observed = ObservedAddresses()
    observed.note(b"a", OURS, 0, kept_port=False)
    assert observed.keeps_ports(0) is None
    observed.note(b"b", OURS, 0, kept_port=True)
    observed.note(b"c", OURS, 0, kept_port=True)
    observed.note(b"d", OURS, 0)
    assert observed.keeps_ports(0) is True


# -- clocks -----------------------------------------------------------------------------------------------------------


@given(
    honest=st.integers(2, 10), lies=st.lists(st.floats(-1e9, 1e9), max_size=9), skew_s=st.sampled_from([-3600, 3600])
)
def test_an_hour_of_skew_is_noticed_and_a_minority_cannot_hide_it(honest: int, lies: list[float], skew_s: int) -> None:
    clocks = PeerClocks()
    lies = lies[: honest - 1]
    for n in range(honest):
        clocks.note(voice(n), skew_s + n / 10)
    for n, lie in enumerate(lies):
        clocks.note(voice(100 + n), lie)
    found = clocks.skew_s()
    if honest + len(lies) < 3:
        assert found is None
    else:
        assert found is not None
        assert skew_s <= found <= skew_s + 1


def test_a_liar_alone_cannot_claim_skew() -> None:
    clocks = PeerClocks()
    for n in range(100):
        clocks.note(b"liar", 1000.0 + n)
    assert clocks.skew_s() is None
    clocks.note(b"a", 0.0)
    clocks.note(b"b", 0.1)
    assert clocks.skew_s() == 0.1


# -- the verdict ------------------------------------------------------------------------------------------------------


@given(honest=st.integers(1, 5), liars=st.integers(0, 4))
def test_a_public_node_stays_public_for_a_lying_minority(honest: int, liars: int) -> None:
    verdicts = Verdicts()
    asked = round_of(yes=honest, no=min(liars, honest - 1))
    for _ in range(3):
        verdicts.judge(asked, {AT.host})
        assert verdicts.status == "public"
        assert verdicts.confirmed == (AT,)


@given(honest=st.integers(1, 5), liars=st.integers(0, 4))
def test_nobody_can_claim_that_a_private_node_is_public(honest: int, liars: int) -> None:
    """A claim without the secret never becomes a vote: a liar is silent, whatever it says."""
    verdicts = Verdicts()
    verdicts.judge(round_of(yes=0, no=honest), {AT.host})
    assert verdicts.status == "private"
    assert verdicts.confirmed == ()
    verdicts.judge(round_of(yes=0, no=0), {AT.host})
    assert verdicts.status == "private"


@given(honest=st.integers(3, 5), liars=st.integers(1, 2), observed=st.booleans())
def test_two_who_dial_us_back_do_not_say_where_against_the_others(honest: int, liars: int, observed: bool) -> None:
    elsewhere, verdicts = Address("ip4", "9.9.9.9", 4001), Verdicts()
    asked = round_of(honest, 0)
    asked.reached.update({voice(500 + n): {elsewhere} for n in range(liars)})
    verdicts.judge(asked, (), (AT.host,) if observed else ())
    assert verdicts.confirmed == (AT,)


def test_what_is_observed_is_told_only_when_somebody_dialed_us_back_there() -> None:
    verdicts = Verdicts()
    verdicts.judge(Round(strangers={voice(1)}), (), (AT.host,))
    assert (verdicts.status, verdicts.confirmed) == ("public", ())
    verdicts.judge(round_of(2, 0, Address("ip4", "9.9.9.9", 4001)), (), (AT.host,))
    assert verdicts.confirmed == (), "two say something else than the observers"
    verdicts.judge(round_of(1, 0), (), (AT.host,))
    assert verdicts.confirmed == (AT,)


def test_one_contradicting_round_does_not_turn_the_verdict_two_do() -> None:
    verdicts = Verdicts()
    assert verdicts.judge(round_of(2, 0), {AT.host})
    assert not verdicts.judge(round_of(0, 2), {AT.host})
    assert verdicts.is_contradicted
    assert verdicts.status == "public"
    assert not verdicts.judge(round_of(2, 1), {AT.host})
    assert not verdicts.is_contradicted
    assert not verdicts.judge(round_of(0, 2), {AT.host})
    assert verdicts.judge(round_of(1, 2), {AT.host})
    assert verdicts.status == "private"


def test_a_clear_round_turns_the_verdict_at_once() -> None:
    verdicts = Verdicts()
    verdicts.judge(round_of(0, 1), ())
    assert verdicts.judge(round_of(CLEAR_VOTES, 0), ())
    assert verdicts.status == "public"
    assert verdicts.how == f"3 of 3 peers that were asked to dial us back came through, at {AT}"


def test_a_tie_changes_nothing() -> None:
    verdicts = Verdicts()
    assert not verdicts.judge(round_of(1, 1), ())
    assert verdicts.status == "unknown"


def test_an_address_that_one_peer_names_is_confirmed_only_if_it_is_ours() -> None:
    verdicts = Verdicts()
    verdicts.judge(round_of(1, 0), {"9.9.9.9"})
    assert (verdicts.status, verdicts.confirmed) == ("public", ())
    verdicts.judge(round_of(2, 0), ())
    assert verdicts.confirmed == (AT,)


def test_confirmed_addresses_are_bounded() -> None:
    verdicts = Verdicts()
    many = {Address("ip4", "8.8.4.4", port) for port in range(1, 1000)}
    verdicts.judge(Round({b"a": many, b"b": many}), ())
    assert len(verdicts.confirmed) == CONFIRMED


def test_strangers_have_one_voice_together() -> None:
    asked = Round(failed={b"a", b"b"}, strangers={voice(n) for n in range(50)})
    assert asked.opinion == "private"
    verdicts = Verdicts()
    verdicts.judge(Round(strangers={b"x"}), ())
    assert (verdicts.status, verdicts.how) == ("public", "a stranger from the internet connected to us")


def test_who_reached_us_cannot_also_have_failed() -> None:
    assert Round({b"a": {AT}}, {b"a"}).opinion == "public"


def test_after_a_change_of_addresses_nothing_is_known() -> None:
    verdicts = Verdicts()
    verdicts.judge(round_of(3, 0), ())
    verdicts.reset()
    assert (verdicts.status, verdicts.confirmed, verdicts.how) == ("unknown", (), "no peer could be asked yet")
