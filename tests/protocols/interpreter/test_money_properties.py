"""Whatever anybody sends, no money appears or vanishes, nothing raises, and a replay gives the same state.

`Chain.block` checks conservation, and that the treasury covers all points, after every block.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kaisar_p2p.wire.codec import is_line
from protocols import deploy
from protocols.epochs import LEASES, REWARDS, EpochCertificate, LeafProof, LeaseLeaf, RewardLeaf
from protocols.genesis import genesis_state
from protocols.interpreter import calls
from protocols.interpreter.apply import apply
from protocols.interpreter.audit import state_root
from protocols.interpreter.state import ORDER_CLOSED
from protocols.params import KAI
from protocols.quorum import QuorumCertificate, VerdictCore

NAMES = st.sampled_from(("alice", "bob", "carol", "provider", "checker0", "checker1", "checker2", "checker3"))
AMOUNTS = st.one_of(
    st.integers(0, 300).map(lambda kai: kai * KAI), st.integers(0, 10**23), st.sampled_from([1, 2**64, 2**128 - 1])
)
KEYS = st.one_of(NAMES, st.binary(min_size=32, max_size=32))
ADDRESSES = st.lists(st.one_of(st.just("/dns/x/tcp/1"), st.text(max_size=20).filter(is_line)), max_size=8)
HEADER_LIES = st.fixed_dictionaries(
    {},
    optional={
        "minted_planck": AMOUNTS,
        "first_slot": st.integers(0, 50),
        "previous": st.binary(min_size=32, max_size=32),
        "registry_root": st.binary(min_size=32, max_size=32),
    },
)


def test_money_is_conserved_by_any_calls(new_chain):
    class Ledger(RuleBasedStateMachine):
        """Honest calls, calls with numbers from anywhere, and bytes."""

        def __init__(self) -> None:
            super().__init__()
            self.chain: Any = None
            self.nonce = 0

        @initialize(as_points=st.sampled_from([0, 1]), fault=st.sampled_from([0, 100, 1000]), working=st.booleans())
        def start(self, as_points, fault, working):
            self.chain = new_chain(
                points_planck=5 * KAI,
                refund_as_points=as_points,
                provider_fault_permille=fault,
                kept_epochs=3,
                release_epochs=2,
            )
            self.chain.block()
            if working:
                self.chain.add_worker()

        def key(self, name: str | bytes, of: str = "owner") -> bytes:
            return name if isinstance(name, bytes) else getattr(self.chain, of)(name)

        @rule(name=NAMES, to=KEYS, amount=AMOUNTS)
        def transfer(self, name, to, amount):
            self.chain.run(name, calls.Transfer(self.key(to), amount))

        @rule(name=NAMES, count=st.integers(0, 60), referrer=st.one_of(KEYS, st.just(bytes(32))))
        def buy_licences(self, name, count, referrer):
            self.chain.run(name, calls.LicenceBuy(count, self.key(referrer)))

        @rule(name=NAMES, kind=st.sampled_from([calls.StakeBond, calls.StakeUnbond]), amount=AMOUNTS)
        def stake(self, name, kind, amount):
            self.chain.run(name, kind(amount))

        @rule(name=NAMES, amount=AMOUNTS, wait=st.integers(0, 3))
        def unbond_and_withdraw(self, name, amount, wait):
            self.chain.run(name, calls.StakeUnbond(min(amount, self.chain.account(name).stake_planck)))
            self.chain.until_epoch(self.chain.state.epoch + wait)
            self.chain.run(name, calls.StakeWithdraw())

        @rule(name=NAMES, machine=NAMES, roles=st.integers(0, 8))
        def bind(self, name, machine, roles):
            self.chain.run(name, self.chain.bind_call(name, roles, machine))

        @rule(name=NAMES, worker=NAMES)
        def register(self, name, worker):
            self.chain.run(name, self.chain.register_call(worker=worker))

        @rule(back=st.integers(-2, 8), verdict=st.integers(0, 6), signers=st.integers(0, 5))
        def activate(self, back, verdict, signers):
            slot = max(0, self.chain.state.slot - back)
            self.chain.run("bob", calls.WorkerActivate(self.chain.verdict(slot, verdict, signers)))

        @rule(mask=st.integers(0, 2**64 - 1), count=st.integers(0, 64))
        def activate_without_signatures(self, mask, count):
            core = VerdictCore(
                self.chain.state.epoch, self.chain.state.slot, self.chain.machine("provider"), bytes(32), 1
            )
            self.chain.run("bob", calls.WorkerActivate(QuorumCertificate(core, mask, (bytes(64),) * count)))

        @rule(name=st.sampled_from(("provider", "bob")), worker=st.one_of(st.just("provider"), KEYS))
        def retire(self, name, worker):
            self.chain.run(name, calls.WorkerRetire(self.key(worker, "machine")))

        @rule(name=st.sampled_from(("alice", "provider")), machine=st.one_of(st.none(), KEYS), addrs=ADDRESSES)
        def announce(self, name, machine, addrs):
            self.chain.run(name, calls.BootstrapAnnounce(self.key(machine or name, "machine"), tuple(addrs)))

        @rule(points=st.integers(0, KAI), price=st.integers(1, 10**20), seconds=st.integers(60, 200))
        def place(self, points, price, seconds):
            self.nonce += 1
            spec = self.chain.place_call().spec
            spec = type(spec)(spec.resources, seconds, bytes(32))
            points = min(points, price * seconds // 3600)
            call = self.chain.place_call(self.nonce, spec, points, price_planck_per_hour=price)
            self.chain.run("alice", call)

        @rule(name=NAMES, escrow=AMOUNTS, points=AMOUNTS, nonce=st.integers(0, 3), price=AMOUNTS)
        def place_oddly(self, name, escrow, points, nonce, price):
            call = self.chain.place_call(nonce, None, points, escrow, price_planck_per_hour=price)
            self.chain.run(name, call)

        @rule(name=st.sampled_from(("alice", "bob", "provider")), order=st.integers(0, 5))
        def cancel(self, name, order):
            self.chain.run(name, calls.OrderCancel(self.order_id(order)))

        def order_id(self, index: int) -> bytes:
            order_ids = sorted(self.chain.state.orders)
            return order_ids[index % len(order_ids)] if order_ids else bytes(32)

        def can_anchor(self) -> bool:
            """Whether the epoch that ends next has a registry whose keys the test holds."""
            chain = self.chain
            chain.until_epoch(chain.state.epoch + 1)
            return (
                bool(chain.state.registries[chain.state.epoch - 1]) and chain.state.last_anchor < chain.state.epoch - 1
            )

        @rule(
            leases=st.lists(
                st.tuples(st.integers(0, 5), st.integers(0, 250), st.integers(0, 5), st.integers(0, 2)), max_size=3
            ),
            rewards=st.lists(st.tuples(NAMES, AMOUNTS), max_size=3),
            minted=st.integers(0, 100 * KAI),
        )
        def anchor_and_draw(self, leases, rewards, minted):
            if not self.can_anchor():
                return
            lease_leaves = tuple(
                LeaseLeaf(self.order_id(order), seconds, 0, out, 0, fault) for order, seconds, out, fault in leases
            )
            reward_leaves = tuple(RewardLeaf(self.key(name), amount) for name, amount in rewards)
            epoch = self.chain.anchor(lease_leaves, reward_leaves, minted_planck=minted)
            for index in range(len(lease_leaves)):
                self.chain.run("bob", calls.LeaseSettle(self.chain.proof(epoch, LEASES, index)))
            for index in range(len(reward_leaves)):
                self.chain.run("bob", calls.RewardClaim(self.chain.proof(epoch, REWARDS, index)))

        @rule(lies=HEADER_LIES, signers=st.integers(0, 4), back=st.integers(-1, 3))
        def anchor_badly(self, lies, signers, back):
            header = self.chain.header(epoch=max(0, self.chain.state.epoch - back), **lies)
            self.chain.run("carol", calls.AnchorPost(header, self.chain.certify(header, signers)))
            self.chain.anchored.pop(header.epoch, None)

        @rule(mask=st.binary(max_size=32), count=st.integers(0, 4))
        def anchor_without_signatures(self, mask, count):
            certificate = EpochCertificate(mask, (bytes(64),) * count)
            self.chain.run(
                "carol", calls.AnchorPost(self.chain.header(epoch=max(0, self.chain.state.epoch - 1)), certificate)
            )

        @rule(
            kind=st.sampled_from([calls.LeaseSettle, calls.RewardClaim]),
            back=st.integers(0, 3),
            tree=st.integers(0, 4),
            leaf=st.binary(max_size=160),
            index=st.integers(0, 3),
        )
        def forge_a_leaf(self, kind, back, tree, leaf, index):
            epoch = max(0, self.chain.state.last_anchor - back)
            self.chain.run("bob", kind(LeafProof(epoch, tree, index, leaf, ())))

        @rule(name=NAMES, call_id=st.integers(75, 100), body=st.binary(max_size=60), magic=st.booleans())
        def bytes_from_anywhere(self, name, call_id, body, magic):
            self.chain.run(name, calls.MAGIC + bytes([call_id]) + body if magic else body)

        @rule(index=st.integers(0, 200), position=st.integers(0, 400), flip=st.integers(1, 255))
        def a_damaged_call(self, index, position, flip):
            payloads = [call.payload for block in self.chain.blocks for call in block.calls if call.payload]
            if payloads:
                damaged = bytearray(payloads[index % len(payloads)])
                damaged[position % len(damaged)] ^= flip
                self.chain.run("alice", bytes(damaged))

        @rule(count=st.integers(1, 6))
        def time_passes(self, count):
            for _ in range(count):
                self.chain.block()

        @invariant()
        def orders_add_up(self):
            if self.chain is None:
                return
            open_ids = {each for ids in self.chain.state.open_orders.values() for each in ids}
            for order_id, order in self.chain.state.orders.items():
                given = order.paid_planck + order.refunded_planck + order.refunded_points
                assert order.locked_planck == given + order.escrow_planck
                assert (order.status == ORDER_CLOSED) == (order_id not in open_ids)
            for account in self.chain.state.accounts.values():
                assert min(account.balance_planck, account.points_planck, account.stake_planck) >= 0

        def teardown(self):
            if self.chain is None:
                return
            state = genesis_state(self.chain.document)
            for block in self.chain.blocks:
                state, _ = apply(state, block)
            assert state == self.chain.state
            assert state_root(state) == state_root(self.chain.state)

    run_state_machine_as_test(Ledger, settings=settings(stateful_step_count=60))


def test_a_whole_life_of_orders_conserves_every_order(new_chain):
    """Every outcome, with and without points, with odd prices: locked = paid + given back."""
    for outcome in (deploy.COMPLETED, deploy.CANCELLED, deploy.FAILED, deploy.EXPIRED):
        chain = new_chain(points_planck=KAI)
        chain.add_worker()
        for nonce, seconds in enumerate((0, 1, 59, 60)):
            order_id = chain.place(nonce, points_planck=7, price_planck_per_hour=10**17 + 1)
            chain.settle(order_id, seconds, outcome)
            order = chain.order(order_id)
            assert order.paid_planck == (10**17 + 1) * seconds // 3600
            assert order.locked_planck == order.paid_planck + order.refunded_planck + order.refunded_points
