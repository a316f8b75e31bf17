"""Seven epoch machines back to back in virtual time, over a bus with delays and the real rules of the ledger."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest

from kaisar_p2p.wire import merkle
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.envelope import open_signed, seal
from protocols import actions as do
from protocols.digests import header_hash
from protocols.epoch_body import leaves_of
from protocols.epoch_gossip import proposers
from protocols.epoch_machine import EpochMachine
from protocols.epochs import REWARDS, VERDICTS, EpochBody, EpochHeader, HeaderProposal
from protocols.equivocation import DoubleVote
from protocols.interpreter import calls
from protocols.interpreter.events import Anchored
from protocols.popw import WRONG
from protocols.proofs import prove_reward
from protocols.quorum import TicketCore
from tests.protocols.epoch_swarm import MESSAGES, Swarm, account_of, proposals_of, reasons, votes_of


def test_all_agree_and_the_anchor_is_posted_once() -> None:
    swarm = Swarm()
    swarm.until_anchored(3)
    for epoch in (1, 2, 3):
        anchor = swarm.state.anchors[epoch]
        assert anchor.header.round == 0
        assert swarm.submitted[f"anchor/{epoch}"] == 1
        assert 3 * anchor.signed_stake >= 2 * anchor.total_stake
        assert {("body", anchor.header_hash) in node.items for node in swarm.nodes.values()} == {True}
    assert not reasons(swarm)
    assert swarm.state.anchors[2].header.verdicts >= 3
    assert swarm.state.anchors[2].header.first_slot == swarm.state.anchors[1].header.last_slot + 1
    assert len({swarm.state.anchors[epoch].header.mix for epoch in (1, 2, 3)}) == 3
    assert len(swarm.body(2).reveals) == 7


def test_rewards_can_be_claimed_from_the_anchored_body() -> None:
    swarm = Swarm()
    swarm.until_anchored(3)
    name = account_of("provider")
    before = swarm.state.accounts[name].balance_planck
    proof = prove_reward(swarm.body(3), name, swarm.network)
    swarm._pending.append((name, calls.payload_of(calls.RewardClaim(proof))))
    swarm.run_for(2.0)
    assert swarm.state.accounts[name].balance_planck > before
    assert swarm.state.accounts[name].claimed_planck > 0


def test_evidence_that_not_everybody_has_delays_an_epoch_by_a_round_only() -> None:
    """Whoever signs nonsense against itself can make more evidence than every node hears of."""
    swarm = Swarm()
    swarm.until_anchored(1)
    for index, node in enumerate(swarm.nodes.values()):
        cores = [TicketCore(bytes([index]) * 32, bytes(32), bytes(32), bytes([each]) * 32) for each in (1, 2)]
        evidence = DoubleVote(bytes([index]) * 32, cores[0], bytes(64), cores[1], bytes(64))
        swarm.step(node, do.Gossip("evidence", evidence, bytes(32), swarm.now))
    swarm.until_anchored(4)
    assert {swarm.state.anchors[epoch].header.round for epoch in (2, 3, 4)} == {1}
    assert "evidence that is not known here" in reasons(swarm)


def test_no_certificate_of_a_slot_is_lost_or_counted_twice() -> None:
    swarm = Swarm()
    swarm.until_anchored(5)
    slots = [certificate.core.slot for epoch in (1, 2, 3, 4, 5) for certificate in swarm.body(epoch).certificates]
    assert slots == sorted(set(slots))
    first = swarm.params.epoch_slots
    assert set(slots) >= set(range(first, 6 * first - 1))  # the very last may still be on its way


def test_a_dead_proposer_is_replaced_in_the_next_round() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    swarm.proposer(2).up = False
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round == 1


def test_a_proposer_that_dies_before_it_submits_is_stood_in_for() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    swarm.proposer(2).change = lambda action: None if isinstance(action, do.Submit) else action
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round in (0, 1)


def test_a_member_that_lacks_a_certificate_fetches_the_body_and_signs() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.checked = False
    swarm.run_until(lambda: swarm.state.epoch == 2)
    swarm.run_for(1.0)
    order = proposers_soon(swarm)
    lacking = swarm.nodes[order]
    swarm.broadcast(swarm.verdict(swarm.state, swarm.state.slot), but=(order,))
    swarm.until_end_of(2)
    if swarm.proposer(2) is lacking:
        pytest.fail("choose another node")
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round == 0
    assert votes_of(lacking, 2)


def proposers_soon(swarm: Swarm) -> bytes:
    """A node that is not among the first proposers of epoch 2, by looking at the future of a copy."""
    copy = Swarm()
    copy.until_anchored(1)
    copy.checked = False
    copy.until_end_of(2)
    return proposers(copy.state, 2)[-1]


def test_a_proposer_that_leaves_out_a_certificate_gets_no_signature() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.run_until(lambda: swarm.state.epoch == 2)
    swarm.until_end_of(2)
    liar = swarm.proposer(2)
    liar.machine._pool.forget(lambda subject: True)
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round == 1
    assert any("left out" in reason for reason in reasons(swarm))
    assert all(0 not in votes_of(node, 2) for node in swarm.nodes.values() if node is not liar)


def wrong_reward(header: EpochHeader, body: EpochBody, network: bytes) -> tuple[EpochHeader, EpochBody]:
    richer = replace(body.rewards[0], cumulative_planck=body.rewards[0].cumulative_planck + 1)
    body = replace(body, rewards=(richer, *body.rewards[1:]))
    root = merkle.root(leaves_of(body, REWARDS, network))
    return replace(header, reward_root=root, minted_planck=header.minted_planck + 1), body


def wrong_verdict(header: EpochHeader, body: EpochBody, network: bytes) -> tuple[EpochHeader, EpochBody]:
    first = body.certificates[0]
    body = replace(body, certificates=(replace(first, core=replace(first.core, verdict=WRONG)), *body.certificates[1:]))
    return replace(header, verdict_root=merkle.root(leaves_of(body, VERDICTS, network))), body


def another(header: EpochHeader) -> EpochHeader:
    """Members sign a header that they can rebuild without asking for its body; this one they cannot."""
    return replace(header, log_root=sha256(b"another").digest())


def wrong_reveal(header: EpochHeader, body: EpochBody, network: bytes) -> tuple[EpochHeader, EpochBody]:
    return another(header), replace(body, reveals=(replace(body.reveals[0], proof=bytes(80)), *body.reveals[1:]))


def chosen_reveals(header: EpochHeader, body: EpochBody, network: bytes) -> tuple[EpochHeader, EpochBody]:
    return another(header), replace(body, reveals=body.reveals[1:])


LIES = {
    "wrong rewards": wrong_reward,
    "wrong state_root": lambda header, body, network: (replace(header, state_root=bytes(32)), body),
    "wrong minted_planck": lambda header, body, network: (replace(header, minted_planck=0), body),
    "wrong mix": lambda header, body, network: (replace(header, mix=bytes(32)), body),
    "wrong lease_root": lambda header, body, network: (replace(header, lease_root=bytes(32)), body),
    "an invalid certificate": wrong_verdict,
    "a false reveal": wrong_reveal,
    "a reveal that was published in time is left out": chosen_reveals,
    "evidence that is not known": lambda header, body, network: (another(header), replace(body, evidence=(bytes(32),))),
    "the body is of another epoch": lambda header, body, network: (another(header), replace(body, epoch=1)),
}


@pytest.mark.parametrize("reason", LIES)
def test_a_proposer_that_lies_gets_no_signature(reason: str) -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    liar = swarm.proposer(2)

    def lie(action: do.Action) -> do.Action:
        if not isinstance(action, do.Publish) or not isinstance(
            message := open_signed(MESSAGES, action.payload, swarm.network).message, HeaderProposal
        ):
            return action
        bodies = liar.machine._tallies[2].bodies
        body = decode(EpochBody, bodies[header_hash(message.header, swarm.network)])
        header, body = LIES[reason](message.header, body, swarm.network)
        bodies[header_hash(header, swarm.network)] = encode(body)
        return replace(action, payload=seal(HeaderProposal(header), liar.keys, swarm.network))

    liar.change = lie
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round == 1
    assert reason in " ".join(reasons(swarm))
    assert all(0 not in votes_of(node, 2) for node in swarm.nodes.values())


def test_a_proposer_that_serves_nothing_or_rubbish_gets_no_signature() -> None:
    for answer in (lambda action: None, lambda action: replace(action, payload=b"rubbish")):
        swarm = Swarm()
        swarm.until_anchored(1)
        swarm.until_end_of(2)
        other = swarm.proposer(2)
        other.change = lambda action, answer=answer: answer(action) if isinstance(action, do.Reply) else action
        other.machine.step(do.Gossip("certificate", swarm.verdict(swarm.state, swarm.state.slot), b"", 0.0), swarm.now)
        swarm.checked = False
        swarm.until_anchored(2)
        assert swarm.state.anchors[2].header.round in (0, 1)


def test_without_a_quorum_the_next_epoch_covers_its_slots() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    down = list(swarm.nodes.values())[:4]
    for node in down:
        node.hears = lambda topic, payload: False
        node.change = lambda action: None if isinstance(action, do.Publish) else action
    swarm.until_end_of(3)
    assert not swarm.anchored(2)
    for node in down:
        node.hears = lambda topic, payload: True
        node.change = lambda action: action
    swarm.until_anchored(3)
    header = swarm.state.anchors[3].header
    assert header.first_slot == swarm.state.anchors[1].header.last_slot + 1
    assert header.first_slot // swarm.params.epoch_slots == 2
    slots = {certificate.core.slot for certificate in swarm.body(3).certificates}
    assert slots >= set(range(header.first_slot, header.last_slot - 1))
    assert header.minted_planck > swarm.params.epoch_reward_planck


@pytest.mark.parametrize("delay_s", [0.3, 1.0, 1.05, 1.15, 1.25, 2.0])
def test_a_restart_never_signs_twice_differently(delay_s: float) -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    ended = swarm.state
    swarm.run_for(delay_s)
    victims = list(dict.fromkeys(id(swarm.proposer(2, round_)) for round_ in range(3)))
    for node in [node for node in swarm.nodes.values() if id(node) in victims]:
        swarm.restart(node)
        node.machine._pool.forget(lambda subject: subject[0] % 2 == 0)  # it lost some, so it builds another body
        if not swarm.anchored(2):
            swarm.step(node, do.BlockApplied(ended, (), live=False))
    swarm.until_anchored(2)
    for node in swarm.nodes.values():
        votes_of(node, 2)
        proposals_of(node, 2)
    if delay_s == 1.25:
        assert swarm.nodes[swarm.proposer(2).keys.public_key].refused


def test_a_late_joiner_fetches_the_anchored_body_and_takes_part() -> None:
    swarm = Swarm()
    swarm.until_anchored(2)
    node = next(iter(swarm.nodes.values()))
    node.machine = EpochMachine(node.keys, swarm.network)
    node.items.clear()
    swarm.until_anchored(3)
    assert ("body", swarm.state.anchors[3].header_hash) in node.items
    swarm.until_anchored(4)
    assert votes_of(node, 4)


def test_a_node_that_was_away_gets_the_body_of_what_was_anchored() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    node = list(swarm.nodes.values())[2]
    swarm.until_end_of(2)
    node.hears = lambda topic, payload: False
    swarm.until_anchored(2)
    swarm.run_for(1.0)
    assert ("body", swarm.state.anchors[2].header_hash) in node.items


@pytest.mark.parametrize("restarts", [False, True])
def test_an_anchor_that_comes_after_the_next_epoch_has_ended_is_built_upon(restarts: bool) -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    away = list(swarm.nodes.values())[3]
    held: list[bytes] = []

    def hold(action: do.Action) -> do.Action | None:
        if not isinstance(action, do.Submit) or action.key != "anchor/2":
            return action
        held.append(action.payload)
        return None

    for node in swarm.nodes.values():
        node.change = hold
    swarm.until_end_of(2)
    away.hears = lambda topic, payload: False
    swarm.until_end_of(3)
    away.hears = lambda topic, payload: True
    assert not swarm.anchored(2)
    for node in swarm.nodes.values() if restarts else ():
        swarm.restart(node)  # all at once: what they had signed for is on their disks only
    swarm._pending.append((account_of("provider"), held[0]))
    swarm.until_anchored(3)
    assert swarm.anchored(2)
    assert swarm.state.anchors[3].header.previous == swarm.state.anchors[2].header_hash
    swarm.run_for(2.0)
    bodies = {digest for kind, digest in away.items if kind == "body"}
    assert {swarm.state.anchors[epoch].header_hash for epoch in (2, 3)} <= bodies


def test_one_checker_alone_closes_epochs() -> None:
    swarm = Swarm(count=1)
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].signed_stake == swarm.state.anchors[2].total_stake


def test_the_anchored_event_is_what_ends_an_epoch() -> None:
    swarm = Swarm()
    swarm.until_anchored(2)
    assert [event.epoch for event in swarm.outcomes if isinstance(event, Anchored)][:2] in ([0, 1], [1, 2])
    assert all(not node.machine._tallies or min(node.machine._tallies) > 2 for node in swarm.nodes.values())
