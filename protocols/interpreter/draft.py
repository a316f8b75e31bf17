"""The state while a block is applied: the same maps, mutable, and what the rules have in common.

A rule looks first and raises `Refused` before it has changed anything; after that it must not fail.
"""

from __future__ import annotations

from dataclasses import replace

from kaisar_p2p.errors import KaisarError
from protocols.committees import check_committee
from protocols.interpreter.events import LedgerEvent
from protocols.interpreter.state import AccountState, MachineState, State, Totals, WorkerState
from protocols.quorum import Committee

_NEW_ACCOUNT = AccountState()


class Refused(KaisarError):
    """A call that the rules do not allow; its message becomes the reason of a `CallIgnored`."""


class Draft:
    """`base` is the state with the new block's number, time, beacons and registries, before its calls."""

    def __init__(self, base: State, events: list[LedgerEvent]) -> None:
        self.base = base
        self.events = events
        self.params = base.params
        self.network = base.network
        self.accounts = base.accounts.mutate()
        self.machines = base.machines.mutate()
        self.workers = base.workers.mutate()
        self.orders = base.orders.mutate()
        self.open_orders = base.open_orders.mutate()
        self.used_offers = base.used_offers.mutate()
        self.bootstrap = base.bootstrap.mutate()
        self.anchors = base.anchors.mutate()
        self.last_anchor = base.last_anchor
        self.licences_sold = base.licences_sold
        self.issued_planck = base.totals.issued_planck
        self.treasury_planck = base.totals.treasury_planck
        self.burnt_planck = base.totals.burnt_planck
        self.reward_pool_planck = base.totals.reward_pool_planck
        self._committees: dict[tuple[int, bytes], Committee | None] = {}

    def check_committee(self, slot: int, worker: bytes) -> Committee | None:
        """As `committees.check_committee`, drawn once in a block: calls that name it cost nothing to whoever sends."""
        if (slot, worker) not in self._committees:
            self._committees[slot, worker] = check_committee(self.base, slot, worker)
        return self._committees[slot, worker]

    def account(self, key: bytes) -> AccountState:
        """The account, or an empty one."""
        return self.accounts.get(key, _NEW_ACCOUNT)

    def payer(self, key: bytes, amount_planck: int) -> AccountState:
        """The account, if its balance covers the amount; nothing moves yet."""
        account = self.account(key)
        if account.balance_planck < amount_planck:
            raise Refused("the balance is too small")
        return account

    def add_balance(self, key: bytes, amount_planck: int) -> None:
        """Change a balance; a negative amount must have been covered by `payer`."""
        account = self.account(key)
        self.accounts[key] = replace(account, balance_planck=account.balance_planck + amount_planck)

    def machine_of(self, owner: bytes, key: bytes) -> MachineState:
        """A machine bound to `owner`."""
        machine = self.machines.get(key)
        if machine is None or machine.owner != owner:
            raise Refused("the machine is not bound to the signer")
        return machine

    def worker(self, key: bytes) -> WorkerState:
        """A worker that was registered, whatever its status."""
        worker = self.workers.get(key)
        if worker is None:
            raise Refused("no such worker")
        return worker

    def finish(self) -> State:
        """The state after the block's calls."""
        return replace(
            self.base,
            accounts=self.accounts.finish(),
            machines=self.machines.finish(),
            workers=self.workers.finish(),
            orders=self.orders.finish(),
            open_orders=self.open_orders.finish(),
            used_offers=self.used_offers.finish(),
            bootstrap=self.bootstrap.finish(),
            anchors=self.anchors.finish(),
            last_anchor=self.last_anchor,
            licences_sold=self.licences_sold,
            totals=Totals(self.issued_planck, self.treasury_planck, self.burnt_planck, self.reward_pool_planck),
        )
