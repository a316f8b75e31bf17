"""Every number of the protocol, with its unit, and the presets. A preset changes numbers only, never rules."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.wire.matproof import Job

KAI = 10**18
"""Planck in one KAI."""
PERMILLE = 1000


@dataclass(frozen=True)
class Params:
    """The defaults are those of `mainnet` (protocol pages in `protocols/README.md` say what each does)."""

    # time, counted in finalized blocks
    block_ms: int = 6_000
    finality_lag_blocks: int = 0
    slot_blocks: int = 5
    epoch_slots: int = 120
    # check committees
    committee_seats: int = 24
    committee_threshold: int = 16
    small_committee_seats: int = 16
    small_committee_threshold: int = 11
    small_swarm_checkers: int = 100
    standby_check_permille: int = 50
    # the compute proof
    job_n: int = 16384
    job_k: int = 16384
    job_tile: int = 128
    job_rounds: int = 1
    deadline_ms: int = 2_850
    challenge_wait_ms: int = 2_000
    challenge_gather_ms: int = 50
    tags_wait_ms: int = 10_000
    samples: int = 16
    registration_samples: int = 32
    # epochs
    reveal_window_ms: int = 5_000
    proposer_timeout_ms: int = 20_000
    certificate_grace_slots: int = 2
    # orders and leases
    deploy_seats: int = 7
    deploy_threshold: int = 5
    offer_hold_ms: int = 10_000
    deploy_timeout_ms: int = 600_000
    unwitnessed_windows: int = 3
    min_duration_s: int = 60
    max_duration_s: int = 90 * 86_400
    advert_ttl_ms: int = 120_000
    advert_interval_ms: int = 30_000
    # money, in planck
    licence_price_planck: int = 100 * KAI
    licence_supply: int = 29_998
    referral_permille: int = 100
    min_stake_planck: int = 100 * KAI
    unbonding_epochs: int = 336
    registration_fee_planck: int = 1 * KAI
    bond_planck: int = 50 * KAI
    provider_fault_permille: int = 100
    release_epochs: int = 48
    epoch_reward_planck: int = 7_631 * KAI
    checker_share_permille: int = 200
    delivery_ratio_permille: int = 500
    refund_as_points: int = 1
    # limits of state
    max_announced_addresses: int = 8
    max_open_orders: int = 256
    kept_epochs: int = 4

    @property
    def job(self) -> Job:
        """The compute job of a check."""
        return Job(self.job_n, self.job_k, self.job_tile, self.job_rounds)

    @property
    def slot_ms(self) -> int:
        """Length of a slot, which is also the witness window of leases."""
        return self.slot_blocks * self.block_ms

    @property
    def epoch_blocks(self) -> int:
        """Blocks of an epoch."""
        return self.slot_blocks * self.epoch_slots

    def slot_of(self, block: int) -> int:
        """The slot that block number `block` belongs to; slot 0 starts with the genesis block."""
        return block // self.slot_blocks

    def epoch_of(self, block: int) -> int:
        """The epoch that block number `block` belongs to."""
        return block // self.epoch_blocks

    def epoch_of_slot(self, slot: int) -> int:
        """The epoch of a slot."""
        return slot // self.epoch_slots

    def ends_epoch(self, block: int) -> bool:
        """True for the last block of an epoch."""
        return (block + 1) % self.epoch_blocks == 0

    def with_overrides(self, overrides: dict[str, int]) -> Params:
        """A copy with some numbers changed; ConfigError names an unknown or non-integer one."""
        known = {item.name for item in fields(self)}
        for name, value in overrides.items():
            if name not in known:
                raise ConfigError(f"unknown parameter {name!r}", hint="see protocols/params.py for the names")
            if type(value) is not int or value < 0:
                raise ConfigError(
                    f"parameter {name} must be a non-negative integer, not {value!r:.40}", hint="amounts are in planck"
                )
        return replace(self, **overrides)


MAINNET = Params()
TESTNET = replace(MAINNET, epoch_slots=20, job_n=8192, job_k=8192, deadline_ms=15_000)
DEMO = replace(
    MAINNET,
    block_ms=500,
    finality_lag_blocks=1,
    slot_blocks=6,
    epoch_slots=4,
    standby_check_permille=250,
    job_n=1024,
    job_k=2048,
    job_rounds=3,
    deadline_ms=6_000,
    challenge_wait_ms=2_500,
    tags_wait_ms=4_000,
    reveal_window_ms=700,
    proposer_timeout_ms=2_500,
    offer_hold_ms=8_000,
    deploy_timeout_ms=30_000,
    advert_ttl_ms=15_000,
    advert_interval_ms=3_000,
    unbonding_epochs=2,
    epoch_reward_planck=100 * KAI,
)
PRESETS = {"mainnet": MAINNET, "testnet": TESTNET, "demo": DEMO}
"""In `demo` all nodes share a machine: jobs take about 0.1 s against a deadline of seconds, so tiers mean nothing."""
