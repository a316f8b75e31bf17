"""Every kind of bad message on every topic: the verdict, who pays for it, and that it changes nothing else."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import msgpack
import pytest
import trio

from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import Signed, seal
from kaisar_p2p.wire.verdict import Verdict
from node.topics import SEEN, TOPICS, VARIANTS, Switchboard
from protocols import adverts, deploy, epoch_gossip, equivocation, popw
from protocols.adverts import WorkerAdvert
from protocols.deploy import DEPLOYING, ENDED, MAX_EVENTS, RUNNING
from protocols.epoch_gossip import MAX_ROUNDS
from protocols.epochs import HeaderProposal
from protocols.orders import Refusal
from protocols.popw import SILENT
from protocols.quorum import QuorumCertificate, ReadyCore, WitnessCore

ACCEPT, IGNORE, REJECT = Verdict.ACCEPT, Verdict.IGNORE, Verdict.REJECT
OTHER_NETWORK = bytes(32)
KINDS = ("advert", "heartbeat", "assignment", "certificate", "evidence", "epoch", "epoch/reveal", "epoch/proposal",
         "lease", "lease/ticket", "lease/ready")  # fmt: skip
SEALED = tuple(kind for kind in KINDS if kind not in ("certificate", "evidence", "lease/ticket", "lease/ready"))
LIMITS = {
    "advert": adverts.ADVERT_BYTES_MAX,
    "heartbeat": adverts.HEARTBEAT_BYTES_MAX,
    "assignment": popw.ENVELOPE_BYTES_MAX,
    "certificate": popw.CERTIFICATE_BYTES_MAX,
    "evidence": equivocation.EVIDENCE_BYTES_MAX,
    "epoch": epoch_gossip.MESSAGE_BYTES_MAX,
    "lease": deploy.LEASE_BYTES_MAX,
}
DEEP = b"\x92\x01" + b"\x91" * 10_000
MUTATIONS: dict[str, Callable[[bytes], bytes]] = {
    "nothing at all": lambda data: b"",
    "its first byte": lambda data: data[:1],
    "its first half": lambda data: data[: len(data) // 2],
    "all but its last byte": lambda data: data[:-1],
    "one byte too many": lambda data: data + b"\x00",
    "twice": lambda data: data * 2,
    "a longer array header": lambda data: b"\xdc\x00" + bytes([data[0] & 15]) + data[1:],
    "a longer tag": lambda data: data[:1] + b"\xcc" + data[1:],
    "a tag of 32 bits": lambda data: data[:1] + b"\xce\x00\x00\x00" + data[1:],
    "a negative tag": lambda data: data[:1] + b"\xff" + data[2:],
    "another tag": lambda data: data[:1] + b"\x7f" + data[2:],
    "a map": lambda data: b"\x81" + data[1:],
    "nil": lambda data: b"\xc0",
    "a float": lambda data: b"\x92\x01\xcb" + bytes(8),
    "an extension": lambda data: b"\x92\x01\xd6\xff" + bytes(4),
    "nested ten thousand deep": lambda data: DEEP,
    "nested five hundred deep": lambda data: b"\x91" * 500 + b"\x90",
    "four thousand million items": lambda data: b"\xdd\xff\xff\xff\xff" + data,
    "four thousand million bytes": lambda data: b"\x92\x01\xc6\xff\xff\xff\xff" + data,
    "bytes that are not UTF-8": lambda data: b"\x92\x01\xa2\xc3\x28",
    "text instead of bytes": lambda data: msgpack.packb([1, "body", "signer", "signature"]),
    "a refusal": lambda data: encode(Refusal(1, "no")),
    "zeros": lambda data: bytes(len(data)),
    "a changed byte at the end": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


def judge(kind: str, data: bytes, world: Any, state: Any = None, now: float | None = None) -> Verdict:
    verdict, reason, message = TOPICS[kind.partition("/")[0]].validate(data, now or world.now, state or world.state)
    assert (verdict is ACCEPT) == (message is not None)
    assert (verdict is ACCEPT) == (reason == "")
    return verdict


@pytest.fixture(scope="module")
def golden() -> dict[str, bytes]:
    """Filled by the first test that needs it: VRF proofs take time."""
    return {}


@pytest.fixture
def specimens(world: Any, golden: dict[str, bytes]) -> dict[str, bytes]:
    if not golden:
        golden.update(world.gossip())
    return golden


@pytest.mark.parametrize("kind", KINDS)
def test_the_specimens_are_valid(kind: str, world: Any) -> None:
    assert judge(kind, world.gossip()[kind], world) is ACCEPT


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_malformed_messages_are_rejected(kind: str, name: str, specimens: dict[str, bytes], world: Any) -> None:
    assert judge(kind, MUTATIONS[name](specimens[kind]), world) is REJECT


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_rejected(kind: str, specimens: dict[str, bytes], world: Any) -> None:
    data = specimens[kind]
    for length in range(0, len(data), max(1, len(data) // 40)):
        assert judge(kind, data[:length], world) is REJECT


@pytest.mark.parametrize("kind", KINDS)
def test_messages_over_the_limit_are_rejected_before_they_are_read(kind: str, world: Any) -> None:
    limit = LIMITS[kind.partition("/")[0]]
    body = msgpack.packb([1, bytes(limit), bytes(32), bytes(64)])
    assert judge(kind, body[: limit + 1], world) is REJECT
    assert judge(kind, body, world) is REJECT


@pytest.mark.parametrize("kind", SEALED)
def test_signatures_of_others_are_rejected(kind: str, world: Any, specimens: dict[str, bytes]) -> None:
    """A flipped bit anywhere, another network, another signer: none counts, and none is the honest author's fault."""
    signed = decode(Signed, specimens[kind])
    for position in (0, 31, 32, 63):
        flipped = bytearray(signed.signature)
        flipped[position] ^= 0x10
        assert judge(kind, encode(replace(signed, signature=bytes(flipped))), world) is REJECT
    assert judge(kind, encode(replace(signed, signature=bytes(64))), world) is REJECT
    assert judge(kind, encode(replace(signed, signer=world.nobody.public_key)), world) is REJECT
    message = _opened(signed.body)
    signer = next(k for k in (*world.checkers, world.worker) if k.public_key == signed.signer)
    assert judge(kind, seal(message, signer, OTHER_NETWORK), world) is REJECT
    assert judge(kind, seal(message, world.nobody, world.network), world) is REJECT


def _opened(body: bytes) -> Any:
    from kaisar_p2p.wire.codec import registered

    return decode(registered()[body[1]], body)


@pytest.mark.parametrize("kind", ["certificate", "lease/ticket", "lease/ready"])
def test_certificates_without_a_quorum_are_rejected(kind: str, world: Any, specimens: dict[str, bytes]) -> None:
    good = decode(QuorumCertificate, specimens[kind])
    one = good.signatures[0]
    bad = [
        replace(good, signatures=good.signatures[:-1]),
        replace(good, mask=good.mask >> 1, signatures=good.signatures[:-1]),
        replace(good, mask=0, signatures=()),
        replace(good, signatures=(one,) * len(good.signatures)),
        replace(good, signatures=good.signatures[::-1]),
        replace(good, signatures=(*good.signatures[:-1], bytes(64))),
        replace(good, mask=good.mask | 1 << 63, signatures=(*good.signatures, one)),
        replace(good, mask=2**64 - 1, signatures=(one,) * 64),
        replace(good, mask=good.mask << 1),
    ]
    for each in bad:
        assert judge(kind, encode(each), world) is REJECT
    other = {"certificate": world.certificate, "lease/ticket": world.ticket}.get(kind)
    if other is not None:
        assert judge(kind, encode(other(network=OTHER_NETWORK)), world) is REJECT
        assert judge(kind, encode(other(count=3)), world) is REJECT


# ── times, slots, epochs, names ──────────────────────────────────────────────────────────────────────────────────────

FAR = 2**32 - 1
FUTURE_MS = 2**64 - 1


def _later(world: Any, seconds: float) -> int:
    return world.now_ms + int(seconds * 1000)


CASES: dict[str, Callable[[Any], tuple[str, bytes, Verdict]]] = {}


def case(kind: str, expected: Verdict, why: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """A message that is well formed and signed but not to be believed now."""

    def register(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CASES[f"{kind}__{expected.name.lower()}_{why}"] = lambda world: (kind, build(world), expected)
        return build

    return register


def _advert(world: Any, signer: KeyPair | None = None, **changes: Any) -> bytes:
    return seal(replace(world.advert(), **changes), signer or world.worker, world.network)


def _big(spec: Any, **changes: int) -> Any:
    return replace(spec, **changes)


case("advert", IGNORE, "from the future")(lambda w: _advert(w, issued_ms=_later(w, 61)))
case("advert", IGNORE, "from the end of time")(lambda w: _advert(w, issued_ms=FUTURE_MS))
case("advert", IGNORE, "expired")(lambda w: _advert(w, issued_ms=_later(w, -16)))
case("advert", IGNORE, "from 1970")(lambda w: _advert(w, issued_ms=0))
case("advert", IGNORE, "another owner")(lambda w: _advert(w, owner=bytes(32)))
case("advert", IGNORE, "an unknown worker")(lambda w: _advert(w, w.nobody, worker=w.nobody.public_key))
case("advert", REJECT, "more free than there is")(lambda w: _advert(w, free=_big(w.advert().spec, cpu_cores=9)))
case("advert", REJECT, "too busy")(lambda w: _advert(w, workload_permille=1001))
case("advert", REJECT, "an unknown runtime")(lambda w: _advert(w, runtime="magic"))
case("advert", REJECT, "no such device")(lambda w: _advert(w, spec=_big(w.advert().spec, device_class=9)))


def _heartbeat(world: Any, signer: KeyPair | None = None, **changes: Any) -> bytes:
    return seal(replace(world.heartbeat(), **changes), signer or world.checkers[1], world.network)


case("heartbeat", IGNORE, "from the future")(lambda w: _heartbeat(w, issued_ms=_later(w, 61)))
case("heartbeat", IGNORE, "from the end of time")(lambda w: _heartbeat(w, issued_ms=FUTURE_MS))
case("heartbeat", IGNORE, "expired")(lambda w: _heartbeat(w, issued_ms=_later(w, -16)))
case("heartbeat", IGNORE, "an unknown node")(lambda w: _heartbeat(w, w.nobody, node=w.nobody.public_key))
case("heartbeat", REJECT, "too busy")(lambda w: _heartbeat(w, workload_permille=1001))


def _assignment(world: Any, signer: KeyPair | None = None, **changes: Any) -> bytes:
    return seal(replace(world.assignment(), **changes), signer or world.checkers[1], world.network)


case("assignment", IGNORE, "a future slot")(lambda w: _assignment(w, slot=8, epoch=2))
case("assignment", IGNORE, "the last slot there is")(lambda w: _assignment(w, slot=FAR, epoch=FAR))
case("assignment", IGNORE, "an old slot")(lambda w: _assignment(w, slot=1, epoch=0))
case("assignment", IGNORE, "an unknown worker")(lambda w: _assignment(w, worker=w.nobody.public_key))
case("assignment", REJECT, "another epoch")(lambda w: _assignment(w, epoch=0))
case("assignment", REJECT, "no seats")(lambda w: _assignment(w, seats=()))
case("assignment", REJECT, "another committee")(lambda w: _assignment(w, seats=w.assignment().seats[::-1]))
case("assignment", REJECT, "not a seat")(lambda w: _assignment(w, w.bound))

case("certificate", IGNORE, "a future slot")(lambda w: encode(w.certificate(slot=8, epoch=2)))
case("certificate", IGNORE, "the last slot there is")(lambda w: encode(w.certificate(slot=FAR, epoch=FAR)))
case("certificate", IGNORE, "an old slot")(lambda w: encode(w.certificate(slot=1, epoch=0)))
case("certificate", IGNORE, "an unknown worker")(lambda w: encode(w.certificate(worker=w.nobody.public_key)))
case("certificate", REJECT, "another epoch")(lambda w: encode(w.certificate(epoch=0)))
case("certificate", REJECT, "no such verdict")(lambda w: encode(w.certificate(verdict=9)))
case("certificate", REJECT, "silent with a commitment")(lambda w: encode(w.certificate(verdict=SILENT)))


def _witness(world: Any, **changes: Any) -> bytes:
    order = world.state.orders[world.order_id]
    core = replace(WitnessCore(world.order_id, order.worker, 7, deploy.UP), **changes)
    return encode(world.certify(core, order.seats, 4))


case("certificate", ACCEPT, "a window")(_witness)
case("certificate", IGNORE, "a future window")(lambda w: _witness(w, slot=8))
case("certificate", IGNORE, "an unknown order")(lambda w: _witness(w, order_id=bytes(32)))
case("certificate", REJECT, "another worker's order")(lambda w: _witness(w, worker=w.victim.public_key))

case("evidence", IGNORE, "nobody's key")(lambda w: encode(w.double_vote(w.nobody)))
case("evidence", IGNORE, "a key without stake")(lambda w: encode(w.double_vote(w.bound)))
case("evidence", REJECT, "another network")(lambda w: encode(w.double_vote(network=OTHER_NETWORK)))
case("evidence", REJECT, "the same twice")(
    lambda w: encode(replace(w.double_vote(), second=w.double_vote().first, second_signature=bytes(64)))
)
case("evidence", REJECT, "somebody else is accused")(
    lambda w: encode(replace(w.double_vote(), signer=w.checkers[1].public_key))
)


def _vote(world: Any, signer: KeyPair | None = None, **changes: Any) -> bytes:
    return seal(replace(world.vote(), **changes), signer or world.checkers[1], world.network)


case("epoch", IGNORE, "an epoch that has not ended")(lambda w: _vote(w, epoch=2))
case("epoch", IGNORE, "the last epoch there is")(lambda w: _vote(w, epoch=FAR))
case("epoch", REJECT, "an impossible round")(lambda w: _vote(w, round=MAX_ROUNDS))
case("epoch", REJECT, "the last round there is")(lambda w: _vote(w, round=2**16 - 1))
case("epoch", REJECT, "no member")(lambda w: _vote(w, w.bound))
case("epoch/reveal", REJECT, "somebody else's proof")(lambda w: seal(w.reveal(w.checkers[2]), w.checkers[1], w.network))


def _proposal(world: Any, signer: KeyPair | None = None, **changes: Any) -> bytes:
    proposal, proposer = world.proposal()
    header = replace(proposal.header, **changes)
    return seal(HeaderProposal(header), signer or proposer, world.network)


def _not_proposer(world: Any) -> KeyPair:
    _, proposer = world.proposal()
    return next(each for each in world.checkers if each is not proposer)


case("epoch/proposal", REJECT, "out of turn")(lambda w: _proposal(w, _not_proposer(w)))
case("epoch/proposal", REJECT, "another registry")(lambda w: _proposal(w, registry_root=bytes(32)))
case("epoch/proposal", REJECT, "another last slot")(lambda w: _proposal(w, last_slot=FAR))
case("epoch/proposal", REJECT, "a slot range that is none")(lambda w: _proposal(w, first_slot=8))
case("epoch/proposal", IGNORE, "the last epoch there is")(lambda w: _proposal(w, epoch=FAR))


def _lease(world: Any, signer: KeyPair | None = None, **changes: Any) -> bytes:
    return seal(replace(world.lease_event(), **changes), signer or world.worker, world.network)


case("lease", IGNORE, "from the future")(lambda w: _lease(w, at_ms=_later(w, 61)))
case("lease", IGNORE, "from the end of time")(lambda w: _lease(w, at_ms=FUTURE_MS))
case("lease", IGNORE, "an unknown order")(lambda w: _lease(w, order_id=bytes(32)))
case("lease", REJECT, "another worker's order")(lambda w: _lease(w, order_id=w.own_order_id))
case("lease", REJECT, "no such state")(lambda w: _lease(w, state=9))
case("lease", REJECT, "running with an outcome")(lambda w: _lease(w, state=RUNNING, outcome=1))
case("lease", REJECT, "ended without an outcome")(lambda w: _lease(w, state=ENDED))
case("lease", REJECT, "an undocumented reason")(lambda w: _lease(w, state=DEPLOYING, reason="because"))
case("lease", REJECT, "too many events")(lambda w: _lease(w, sequence=MAX_EVENTS))


def _ticket(world: Any, **changes: Any) -> bytes:
    good = world.ticket().core
    return encode(world.certify(replace(good, **changes), world.state.orders[world.order_id].seats, 4))


case("lease/ticket", IGNORE, "an unknown order")(lambda w: _ticket(w, order_id=bytes(32)))
case("lease/ticket", REJECT, "another client")(lambda w: _ticket(w, client_key=bytes(32)))
case("lease/ticket", REJECT, "another offer")(lambda w: _ticket(w, offer_hash=bytes(32)))
case("lease/ready", REJECT, "another worker")(
    lambda w: encode(w.certify(ReadyCore(w.order_id, w.victim.public_key), w.state.orders[w.order_id].seats, 4))
)
case("lease", REJECT, "a certificate of a check")(lambda w: encode(w.certificate()))


@pytest.mark.parametrize("name", CASES)
def test_gossip(name: str, world: Any) -> None:
    kind, data, expected = CASES[name](world)
    assert judge(kind, data, world) is expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_in_a_later_epoch_is_never_accepted_as_new(kind: str, specimens: dict[str, bytes], world: Any) -> None:
    """What was true then changes nothing now: adverts expire, epochs and orders are over, slots are forgotten."""
    state = world.state
    closed = replace(state.orders[world.order_id], status=3)
    later = replace(
        state,
        number=state.number + 200,
        beacons=type(state.beacons)(),
        last_anchor=5,
        orders=state.orders.set(world.order_id, closed),
    )
    verdict = judge(kind, specimens[kind], world, later, world.now + 3600)
    if kind == "evidence":  # it stays true; whoever has it already drops the repeat
        assert verdict is ACCEPT
    else:
        assert verdict is IGNORE


# ── the switchboard: duplicates, shares, and what was refused before ─────────────────────────────────────────────────


class Gate:
    """The validators as the mesh calls them."""

    def __init__(self, world: Any) -> None:
        from node.inbox import Inbox

        self.world, self.now = world, world.now
        self.board = Switchboard(Inbox(), lambda: world.state, world.victim.public_key, lambda: self.now)
        self.validators = {name: self.board._validator(name, topic) for name, topic in TOPICS.items()}

    def judge(self, kind: str, data: bytes) -> tuple[Verdict, str]:
        return self.validators[kind.partition("/")[0]](data, bytes(32), bytes(32), self.now)


@pytest.fixture
def gate(world: Any) -> Gate:
    return Gate(world)


@pytest.mark.parametrize("kind", KINDS)
def test_a_duplicate_costs_nothing_and_changes_nothing(kind: str, world: Any, gate: Gate) -> None:
    data = world.gossip()[kind]
    assert gate.judge(kind, data) == (ACCEPT, "")
    for _ in range(3):
        assert gate.judge(kind, data) == (IGNORE, "duplicate")


def test_what_is_expensive_to_refuse_is_refused_once(world: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = encode(world.double_vote(network=OTHER_NETWORK))
    assert gate.judge("evidence", bad)[0] is REJECT
    calls: list[object] = []
    monkeypatch.setattr(equivocation, "verify_evidence", lambda *each: calls.append(each))
    for _ in range(5):
        assert gate.judge("evidence", bad) == (REJECT, "refused before")
    assert calls == []


def test_what_one_topic_refuses_another_may_accept(world: Any, gate: Gate) -> None:
    ticket = world.gossip()["lease/ticket"]
    for topic in ("certificate", "evidence"):
        gate.judge(topic, ticket)
    assert gate.judge("lease", ticket)[0] is ACCEPT


def test_an_author_cannot_fill_the_network_with_true_messages(world: Any, gate: Gate) -> None:
    verdicts = [gate.judge("advert", _advert(world, issued_ms=world.now_ms - n))[0] for n in range(500)]
    assert verdicts.count(ACCEPT) == TOPICS["advert"].burst
    assert REJECT not in verdicts
    other = seal(replace(world.heartbeat(), node=world.checkers[2].public_key), world.checkers[2], world.network)
    assert gate.judge("heartbeat", other)[0] is ACCEPT
    gate.now += 10
    assert gate.judge("advert", _advert(world, issued_ms=world.now_ms + 1))[0] is ACCEPT


def test_a_member_cannot_vote_without_end(world: Any, gate: Gate) -> None:
    verdicts = [gate.judge("epoch", _vote(world, header_hash=os.urandom(32)))[0] for _ in range(200)]
    assert verdicts.count(ACCEPT) == TOPICS["epoch"].burst
    assert gate.judge("epoch", _vote(world, world.checkers[2]))[0] is ACCEPT


def test_a_guilty_key_cannot_fill_the_network_with_evidence_against_itself(world: Any, gate: Gate) -> None:
    guilty = world.checkers[3]
    verdicts = [gate.judge("evidence", encode(world.double_vote(guilty, slot=n)))[0] for n in range(150)]
    assert verdicts.count(ACCEPT) == TOPICS["evidence"].burst
    assert gate.judge("evidence", encode(world.double_vote(world.checkers[2])))[0] is ACCEPT


def test_signatures_cannot_be_rearranged_without_end(world: Any, gate: Gate) -> None:
    """Any T of the signatures on one core are another valid certificate: with 12 of 24 seats, there are millions."""
    seats = tuple(each.public_key for each in world.checkers)
    order = replace(world.state.orders[world.order_id], threshold=1)
    world.state = replace(world.state, orders=world.state.orders.set(world.order_id, order))
    full = world.certify(world.ready().core, order.seats, len(seats))
    variants = [
        QuorumCertificate(full.core, sum(1 << seat for seat in chosen), tuple(full.signatures[s] for s in chosen))
        for count in range(1, 6)
        for chosen in combinations(range(5), count)
    ]
    verdicts = [gate.judge("lease", encode(each))[0] for each in variants]
    assert len(variants) == 31
    assert verdicts.count(ACCEPT) == VARIANTS
    assert gate.judge("lease", encode(world.ticket()))[0] is ACCEPT


def test_the_memory_of_digests_is_bounded(world: Any, gate: Gate) -> None:
    for number in range(SEEN + 100):
        gate.board._seen.add(number.to_bytes(32, "big"))
        gate.board._refused.add(number.to_bytes(32, "big"))
    assert len(gate.board._seen._digests) == SEEN
    assert len(gate.board._refused._digests) < SEEN


# ── over real connections ────────────────────────────────────────────────────────────────────────────────────────────


async def lives(arena: Any, victim: Any, neighbour: Any) -> None:
    """A neighbour's advert arrives while whatever is going on goes on."""
    world = arena.world
    issued = world.now_ms + len(victim.node.index.adverts) + next(_issued)
    await neighbour.publish("advert", _advert(world, issued_ms=issued))
    await arena.eventually(lambda: _known(victim, world.worker.public_key) == issued)
    assert neighbour.is_connected(victim.mesh.key)
    assert victim.mesh.is_connected(neighbour.key)


_issued = iter(range(1, 10**6))


def _known(victim: Any, key: bytes) -> int:
    advert: WorkerAdvert | None = victim.node.index.adverts.get(key)
    return advert.issued_ms if advert is not None else -1


@pytest.mark.parametrize("topic", TOPICS)
async def test_rejected_messages_cost_their_sender_the_connection(topic: str, arena: Any) -> None:
    victim = await arena.victim()
    neighbour, attacker = await arena.peer(victim), await arena.peer(victim)
    for number in range(11):  # ten points each, of which a little is forgotten meanwhile, and a hundred are too many
        if number < 10:
            assert victim.mesh.is_connected(attacker.key)
        await attacker.publish(topic, b"garbage %d" % number)
        await arena.eventually(lambda n=number: victim.judged(topic, "reject") >= min(n + 1, 10))
    await arena.eventually(lambda: not victim.mesh.is_connected(attacker.key))
    await lives(arena, victim, neighbour)


@pytest.mark.parametrize(
    "name",
    [
        "advert__ignore_from the future",
        "certificate__ignore_a future slot",
        "evidence__ignore_nobody's key",
        "epoch__ignore_the last epoch there is",
        "lease__ignore_an unknown order",
    ],
)
async def test_ignored_messages_cost_nothing(name: str, arena: Any) -> None:
    victim = await arena.victim()
    peer = await arena.peer(victim)
    kind, data, _ = CASES[name](arena.world)
    topic = kind.partition("/")[0]
    for _ in range(40):
        await peer.publish(topic, data)
    await arena.eventually(lambda: victim.judged(topic, "ignore") == 40)
    assert [each.score for each in victim.mesh.peers() if each.key == peer.key] == [0.0]
    await lives(arena, victim, peer)


async def test_a_flood_fills_nothing(arena: Any) -> None:
    """2,000 messages that are well formed and useless, and as many duplicates: tables and memory stay as they are."""
    world = arena.world
    victim = await arena.victim()
    neighbour, attacker = await arena.peer(victim), await arena.peer(victim)
    await lives(arena, victim, neighbour)
    before, memory_kb = victim.sizes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nobody = [KeyPair.from_seed(n.to_bytes(32, "big")) for n in range(1, 21)]
    useless: list[tuple[str, bytes]] = []
    for number in range(100):
        keys = nobody[number % len(nobody)]
        useless += [
            ("advert", _advert(world, keys, worker=keys.public_key, issued_ms=world.now_ms - number)),
            ("heartbeat", _heartbeat(world, keys, node=keys.public_key, issued_ms=world.now_ms - number)),
            ("assignment", _assignment(world, keys, slot=number + 100, epoch=(number + 100) // 4)),
            ("certificate", encode(world.certificate(slot=number + 100, epoch=(number + 100) // 4))),
            ("evidence", encode(world.double_vote(keys, slot=number))),
            ("epoch", _vote(world, keys, epoch=number + 2)),
            ("lease", _lease(world, order_id=number.to_bytes(32, "big"))),
            ("lease", _ticket(world, order_id=number.to_bytes(32, "big"))),
        ]
    key = world.bound.public_key
    owner = world.state.machines[key].owner
    own = [_advert(world, world.bound, worker=key, owner=owner, issued_ms=world.now_ms - n) for n in range(600)]
    useless += [("advert", data) for data in own]
    useless += [("advert", own[0])] * 600
    for number, (topic, data) in enumerate(useless):
        await attacker.publish(topic, data)
        if number % 100 == 99:
            await trio.sleep(0.02)
    total = lambda: sum(victim.judged(t, v) for t in TOPICS for v in ("accept", "ignore", "reject"))  # noqa: E731
    await arena.eventually(lambda: total() >= len(useless))
    await lives(arena, victim, neighbour)
    assert not victim.node.inbox.dropped
    grown = {name: size - before[name] for name, size in victim.sizes().items() if size > before[name] + 32}
    assert all("Switchboard" in name and size <= 2 * len(useless) for name, size in grown.items()), grown
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kb < 32 * 1024
    assert victim.mesh.is_connected(attacker.key)


def test_there_is_a_specimen_of_every_kind(world: Any) -> None:
    assert {kind.partition("/")[0] for kind in KINDS} == set(TOPICS)
    assert set(world.gossip()) == set(KINDS)
