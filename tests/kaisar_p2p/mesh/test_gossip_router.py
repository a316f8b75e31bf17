from __future__ import annotations

import random
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.gossip import router as gossipsub
from kaisar_p2p.mesh.gossip.router import MessageCache, Router

T = "topic"


def router(*, scores: dict[bytes, float] | None = None, seed: int = 1) -> Router:
    known = {} if scores is None else scores
    made = Router(random.Random(seed), lambda peer: known.get(peer, 0.0))
    made.join(T)
    return made


def with_peers(made: Router, count: int, *, outbound: bool = True) -> list[bytes]:
    peers = [b"peer%d" % number for number in range(count)]
    for peer in peers:
        made.add_peer(peer, outbound=outbound)
        made.on_subscription(peer, T, True)
    return peers


def test_the_heartbeat_fills_the_mesh_to_the_degree() -> None:
    made = router()
    with_peers(made, 30)
    out = made.heartbeat(0.0)
    assert len(made.mesh[T]) == gossipsub.DEGREE
    assert {peer for peer, control in out.items() if control.graft == [T]} == made.mesh[T]


def test_peers_without_the_topic_are_not_grafted() -> None:
    made = router()
    made.add_peer(b"p", outbound=True)
    assert made.heartbeat(0.0) == {}


def test_a_mesh_that_is_too_large_shrinks_and_keeps_outbound_peers() -> None:
    made = router()
    inbound = with_peers(made, 20, outbound=False)
    made.add_peer(b"out1", outbound=True)
    made.add_peer(b"out2", outbound=True)
    made.mesh[T] = {*inbound, b"out1", b"out2"}
    out = made.heartbeat(0.0)
    assert len(made.mesh[T]) == gossipsub.DEGREE
    assert {b"out1", b"out2"} <= made.mesh[T]
    assert sum(bool(control.prune) for control in out.values()) == 16


def test_a_peer_in_disgrace_leaves_the_mesh_and_is_not_taken_back() -> None:
    scores: dict[bytes, float] = {}
    made = router(scores=scores)
    peers = with_peers(made, 3)
    made.heartbeat(0.0)
    scores[peers[0]] = -1.0
    out = made.heartbeat(1.0)
    assert peers[0] not in made.mesh[T]
    assert out[peers[0]].prune
    made.heartbeat(1000.0)
    assert peers[0] not in made.mesh[T]
    answer, _ = made.on_graft(peers[0], [T], 2000.0)
    assert answer.prune


def test_a_graft_is_taken_until_the_mesh_is_full() -> None:
    made = router()
    peers = with_peers(made, 20, outbound=False)
    refused = [peer for peer in peers if made.on_graft(peer, [T], 0.0)[0].prune]
    assert len(made.mesh[T]) == gossipsub.DEGREE_HIGH
    assert len(refused) == 20 - gossipsub.DEGREE_HIGH


def test_the_more_peers_want_a_place_the_less_often_each_may_ask() -> None:
    made = router()
    few = with_peers(made, 20, outbound=False)
    assert {s for peer in few for _, s in made.on_graft(peer, [T], 0.0)[0].prune} == {60.0}
    many = with_peers(made, 1000, outbound=False)
    (last,) = made.on_graft(many[-1], [T], 0.0)[0].prune
    assert last == (T, 500.0)
    answer, impatient = made.on_graft(many[-1], [T], 499.0)
    assert impatient and answer.prune
    assert not made.on_graft(many[-1], [T], 1100.0)[1]


def test_a_graft_during_backoff_is_refused_and_noted() -> None:
    made = router()
    (peer,) = with_peers(made, 1)
    made.on_prune(peer, T, 30.0, 0.0)
    answer, impatient = made.on_graft(peer, [T], 10.0)
    assert answer.prune and impatient
    assert T not in {t for control in made.heartbeat(20.0).values() for t in control.graft}
    made.heartbeat(200.0)
    assert peer in made.mesh[T]


def test_a_graft_for_an_unknown_topic_is_not_answered() -> None:
    made = router()
    (peer,) = with_peers(made, 1)
    answer, impatient = made.on_graft(peer, ["unknown"], 0.0)
    assert not answer.prune and not impatient


def test_own_messages_flood_others_follow_the_mesh() -> None:
    made = router()
    peers = with_peers(made, 15)
    made.heartbeat(0.0)
    assert set(made.targets(T, own=True, exclude=())) == set(peers)
    assert set(made.targets(T, own=False, exclude=())) == made.mesh[T]
    sender = next(iter(made.mesh[T]))
    assert sender not in made.targets(T, own=False, exclude=(sender,))


def test_peers_outside_the_mesh_are_offered_recent_messages_and_can_ask() -> None:
    made = router()
    peers = with_peers(made, 20)
    made.heartbeat(0.0)
    made.cache.put(b"id", T, b"entry")
    out = made.heartbeat(1.0)
    offered = {peer for peer, control in out.items() if control.ihave == {T: [b"id"]}}
    assert len(offered) == gossipsub.LAZY_DEGREE
    assert not offered & made.mesh[T]
    assert made.on_ihave(peers[0], [(T, [b"a", b"b"])], {b"a"}.__contains__, 1.0).iwant == [b"b"]
    assert made.on_iwant(peers[0], [b"id"]) == [(b"id", T, b"entry")]


def test_offers_and_questions_are_limited() -> None:
    made = router()
    (peer,) = with_peers(made, 1)
    ids = [b"%d" % number for number in range(10_000)]
    asked = [made.on_ihave(peer, [(T, ids)], lambda _: False, 0.0).iwant for _ in range(100)]
    assert sum(map(len, asked)) == gossipsub.MAX_OFFERED_IDS
    made.heartbeat(1.0)
    assert made.on_ihave(peer, [(T, ids)], lambda _: False, 1.0).iwant
    made.cache.put(b"id", T, b"entry")
    assert [made.cache.resend(b"id", peer) for _ in range(5)].count((T, b"entry")) == gossipsub.MAX_RESENDS


def test_the_cache_forgets_after_some_heartbeats_and_above_its_size() -> None:
    cache = MessageCache(max_bytes=10 * (10 + gossipsub._OVERHEAD_BYTES))
    cache.put(b"old", T, bytes(10))
    for _ in range(gossipsub.HISTORY):
        cache.shift()
    assert cache.resend(b"old", b"p") is None
    for number in range(50):
        cache.put(b"%d" % number, T, bytes(10))
    assert cache.resend(b"39", b"p") is None
    assert cache.resend(b"49", b"p") == (T, bytes(10))
    assert cache._bytes <= 10 * (10 + gossipsub._OVERHEAD_BYTES)


@given(st.integers(0, 2**32), st.integers(2, 25))
def test_routers_that_talk_to_each_other_reach_everybody(seed: int, count: int) -> None:
    """Whatever the order of things, after a few heartbeats a message reaches all nodes through meshes and offers."""
    rng = random.Random(seed)
    names = [b"n%d" % number for number in range(count)]
    nodes = {name: Router(random.Random(rng.random()), lambda _: 0.0) for name in names}
    for name, node in nodes.items():
        node.join(T)
        for other in names:
            if other != name:
                node.add_peer(other, outbound=name < other)
                node.on_subscription(other, T, True)
    for beat in range(4):
        for name, node in nodes.items():
            for peer, control in node.heartbeat(float(beat)).items():
                answer, _ = nodes[peer].on_graft(name, control.graft, float(beat))
                for topic, backoff_s in (*control.prune,):
                    nodes[peer].on_prune(name, topic, backoff_s, float(beat))
                for topic, backoff_s in answer.prune:
                    node.on_prune(peer, topic, backoff_s, float(beat))
    for name, node in nodes.items():
        assert len(node.mesh[T]) <= gossipsub.DEGREE_HIGH + gossipsub.DEGREE
        assert all(name in nodes[peer].mesh[T] for peer in node.mesh[T])  # meshes are symmetric
    hops: dict[bytes, int] = defaultdict(int)
    queue = [names[0]]
    reached = {names[0]}
    while queue:
        name = queue.pop(0)
        for peer in nodes[name].targets(T, own=name == names[0], exclude=()):
            if peer not in reached:
                reached.add(peer)
                hops[peer] = hops[name] + 1
                queue.append(peer)
    assert reached == set(names)


def test_those_who_dial_us_cannot_fill_a_mesh() -> None:
    made = router()
    attackers = with_peers(made, 40, outbound=False)
    for peer in attackers:
        made.on_graft(peer, [T], 0.0)
    assert len(made.mesh[T]) == gossipsub.DEGREE_HIGH
    for name in (b"ours1", b"ours2", b"ours3"):
        made.add_peer(name, outbound=True)
        made.on_subscription(name, T, True)
    made.heartbeat(1.0)
    assert sum(peer not in attackers for peer in made.mesh[T]) >= gossipsub.DEGREE_OUTBOUND
    made.heartbeat(2.0)
    assert sum(peer not in attackers for peer in made.mesh[T]) >= gossipsub.DEGREE_OUTBOUND
    assert len(made.mesh[T]) <= gossipsub.DEGREE_HIGH


def test_of_120000_topics_few_are_stored_and_ours_always_are() -> None:
    made = router()
    made.add_peer(b"p", outbound=False)
    for number in range(120_000):
        made.on_subscription(b"p", f"unknown {number}", True)
    made.on_subscription(b"p", "x" * 100_000, True)
    made.on_subscription(b"p", T, True)
    assert made.subscribers(T) == [b"p"]
    topics = made._peers[b"p"].topics
    assert len(topics) == gossipsub.MAX_TOPICS_PER_PEER + 1
    assert max(map(len, topics)) <= gossipsub.MAX_TOPIC_LENGTH


def test_questions_of_a_peer_are_limited_in_each_heartbeat() -> None:
    made = router()
    (peer,) = with_peers(made, 1)
    for number in range(3000):
        made.cache.put(b"%d" % number, T, b"entry")
    ids = [b"%d" % number for number in range(3000)]
    assert len(made.on_iwant(peer, ids)) == gossipsub.MAX_REQUESTS
    assert made.on_iwant(peer, ids) == []
    made.heartbeat(1.0)
    assert len(made.on_iwant(peer, ids)) == gossipsub.MAX_REQUESTS
    assert made.on_iwant(b"stranger", ids) == []


def test_an_offer_is_a_promise() -> None:
    made = router()
    liar, honest, lucky = with_peers(made, 3)
    seen: set[bytes] = set()
    for peer, name in ((liar, b"never"), (honest, b"soon"), (lucky, b"from somebody else")):
        assert made.on_ihave(peer, [(T, [name])], seen.__contains__, 0.0).iwant == [name]
    made.on_kept_promise(honest, b"soon")
    seen.add(b"from somebody else")
    assert made.broken_promises(seen.__contains__, gossipsub.PROMISE_S - 0.1) == []
    assert made.broken_promises(seen.__contains__, gossipsub.PROMISE_S) == [liar]
    assert made.broken_promises(seen.__contains__, gossipsub.PROMISE_S + 1) == []


def test_ids_that_no_message_can_have_are_not_asked_for() -> None:
    made = router()
    (peer,) = with_peers(made, 1)
    assert made.on_ihave(peer, [(T, [bytes(100_000), b"id"])], lambda _: False, 0.0).iwant == [b"id"]


PEERS = [b"a", b"b", b"c", b"d"]
TOPICS = st.sampled_from([T, "other", "x" * 500])
CALLS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(PEERS), st.booleans()),
    st.tuples(st.just("remove"), st.sampled_from(PEERS)),
    st.tuples(st.just("subscription"), st.sampled_from(PEERS), TOPICS, st.booleans()),
    st.tuples(st.just("graft"), st.sampled_from(PEERS), st.lists(TOPICS, max_size=4)),
    st.tuples(st.just("prune"), st.sampled_from(PEERS), TOPICS, st.floats(-1e9, 1e18)),
    st.tuples(st.just("ihave"), st.sampled_from(PEERS), TOPICS, st.lists(st.binary(max_size=100), max_size=20)),
    st.tuples(st.just("iwant"), st.sampled_from(PEERS), st.lists(st.binary(max_size=2), max_size=20)),
    st.tuples(st.just("put"), st.binary(max_size=2)),
    st.tuples(st.just("score"), st.sampled_from(PEERS), st.floats(-10, 0)),
    st.tuples(st.just("heartbeat")),
)


@given(st.lists(CALLS, max_size=60))
def test_whatever_peers_do_the_meshes_hold_their_rules(calls: list[tuple]) -> None:  # type: ignore[type-arg]
    scores: dict[bytes, float] = {}
    made, present, now = router(scores=scores), set(), 0.0
    for name, *arguments in calls:
        now += 0.25
        match name, arguments:
            case "add", [peer, outbound]:
                made.add_peer(peer, outbound=outbound)
                present.add(peer)
            case "remove", [peer]:
                made.remove_peer(peer)
                present.discard(peer)
            case "subscription", [peer, topic, subscribe]:
                made.on_subscription(peer, topic, subscribe)
            case "graft", [peer, topics]:
                answer, _ = made.on_graft(peer, topics, now)
                assert {topic for topic, _ in answer.prune} <= {T}
            case "prune", [peer, topic, backoff_s]:
                made.on_prune(peer, topic, backoff_s, now)
                assert all(until <= now + 10 * gossipsub.PRUNE_BACKOFF_S for until in made._backoff.values())
            case "ihave", [peer, topic, ids]:
                assert set(made.on_ihave(peer, [(topic, ids)], lambda _: False, now).iwant) <= set(ids)
            case "iwant", [peer, ids]:
                assert {found[0] for found in made.on_iwant(peer, ids)} <= set(ids)
            case "put", [message_id]:
                made.cache.put(message_id, T, b"entry")
            case "score", [peer, score]:
                scores[peer] = score
            case "heartbeat", []:
                out = made.heartbeat(now)
                assert set(out) <= present
                assert all(scores.get(peer, 0.0) >= 0 for peer in made.mesh[T])
                made.broken_promises(lambda _: False, now)
        assert set(made.mesh) == {T} and made.mesh[T] <= present
        assert all(T in made._peers[peer].topics for peer in made.mesh[T])
