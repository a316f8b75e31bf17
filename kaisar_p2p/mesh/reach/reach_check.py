"""Finding out how others reach this node: asks peers, keeps the verdict, asks again.

Asked first are peers that we dialed ourselves: who dials us was not chosen by us. The verdict is looked at again every
`reach_check_s`, when our addresses change, and soon when a stranger gets through although we took it for impossible.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

import trio

from kaisar_p2p.errors import DecodeError, MeshError
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.addresses import Address, local_addresses, parse
from kaisar_p2p.mesh.limits import MeshConfig
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.reach import dialback
from kaisar_p2p.mesh.reach.dialback import DIALED, FAILED, Answer, Question
from kaisar_p2p.mesh.reach.dialed_back import SECRET_BYTES
from kaisar_p2p.mesh.reach.reachability import (
    SKEW_TOLERATED_S,
    ObservedAddresses,
    PeerClocks,
    Reachability,
    Round,
    Verdicts,
    host_of,
    is_public,
    kind_of,
    voice_of,
)
from kaisar_p2p.wire.codec import decode, encode

log = logging.getLogger(__name__)

ASK_DEADLINE_S = 5.0
_GATHER_S = 2.0  # before the first round, so that more than one peer can be asked
_RETRY_S, _RETRY_MAX_S = 5.0, 600.0  # while nothing is known, and nobody else comes who could tell
_RETRY_WITH_OTHERS_S = 120.0
_AGAIN_S = 60.0  # at the earliest, whatever a stranger does
_LOOK_S = 30.0  # at our own addresses
_OBSERVERS = 16  # peers asked how they see us
_CLOCK_SET_S = 2.0
_CLOCKS = 4  # peers whose clocks are asked for, whoever dialed
_STRANGERS = 64

_CAN = {"public": " dial this node", "private": "not dial this node", "unknown": " perhaps dial this node"}

Requester = Callable[[Connection, bytes], Awaitable[bytes]]


def counts_private(config: MeshConfig) -> bool:
    """Whether loopback and private addresses take part, as in a lab: said so, or the node listens on one."""
    if config.allow_private is not None:
        return config.allow_private
    return any(address.is_private and not address.is_wildcard for address in _parsed(config.listen))


def announced_by(config: MeshConfig) -> tuple[Address, ...]:
    """The TCP addresses that the operator announces."""
    return tuple(_parsed(config.announce))


def _parsed(texts: Iterable[str]) -> Iterator[Address]:
    for text in texts:
        with contextlib.suppress(ValueError):
            yield parse(text)[0]


@dataclass
class _Secret:
    """Handed to one peer for one port; `arrived` when it comes in over a dialed connection."""

    arrived: bool = False


class ReachCheck:
    """The node's knowledge about its own reachability; `run` keeps it up to date.

    `on_change` is called with every new report. `mapped` are addresses at which a router forwards to us; `announced`
    those that the operator named.
    """

    def __init__(
        self,
        network: Network,
        request: Requester,
        rng: random.Random,
        *,
        announced: Iterable[Address] = (),
        allow_private: bool,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.on_change: Callable[[Reachability], None] = lambda _report: None
        self.mapped: Callable[[], Address | None] = lambda: None
        self._network, self._request, self._rng = network, request, rng
        self._announced = tuple(announced)
        self._allow_private = allow_private
        self._wall_clock = wall_clock
        self._observed, self._clocks, self._verdicts = ObservedAddresses(), PeerClocks(), Verdicts()
        self._asked: dict[bytes, Connection] = {}
        self._secrets: dict[bytes, _Secret] = {}
        self._strangers: set[bytes] = set()
        self._checked_at: float | None = None
        self._next_round: float | None = None  # None: when there is a peer to ask
        self._retries = 0
        self._hosts: tuple[str, ...] = ()
        self._warned = False
        self._clock_offset_s = 0.0  # of the wall clock from trio's
        self._wake = trio.Event()
        network.upgrader.take_secret = self._take_secret  # type: ignore[attr-defined]

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def report(self) -> Reachability:
        """What is known now."""
        now = trio.current_time()
        return Reachability(
            self._verdicts.status,
            tuple(map(str, self._verdicts.confirmed)),
            self._verdicts.how,
            self._checked_at,
            self._observed.agreed(now),
            self._observed.keeps_ports(now),
            self._clocks.skew_s(),
        )

    @property
    def confirmed(self) -> tuple[Address, ...]:
        """Our addresses at which peers dialed us back."""
        return self._verdicts.confirmed

    def check_soon(self) -> None:
        """Something changed, such as a port that a router forwards now: ask again."""
        self._next_round = min(self._next_round or 0.0, trio.current_time())
        self._wake.set()

    # -- what happens -------------------------------------------------------------------------------------------------

    def on_connected(self, connection: Connection) -> None:
        """A connection is new: it may tell how we are seen, or be the proof that others get through."""
        if connection.inbound:
            self._note_stranger(connection)
        if self._is_unsure and self._checked_at is not None and self._next_round is not None:
            self._next_round = min(self._next_round, max(trio.current_time(), self._checked_at + _RETRY_WITH_OTHERS_S))
        self._wake.set()

    def on_disconnected(self, connection: Connection) -> None:
        """A connection is over."""
        if self._asked.get(connection.key) is connection:
            del self._asked[connection.key]

    def _note_stranger(self, connection: Connection) -> None:
        """Unasked, from the open internet, and no second connection of a peer that may have punched a hole."""
        known = len(self._network.connections_with(connection.key)) > 1
        if known or connection.relayed or not is_public(connection.remote_host):
            return
        if len(self._strangers) < _STRANGERS:
            self._strangers.add(voice_of(connection.remote_host, connection.key))
        if self._verdicts.status != "public" and self._next_round is not None and self._checked_at is not None:
            self._next_round = min(self._next_round, max(trio.current_time(), self._checked_at + _AGAIN_S))

    def _take_secret(self, secret: bytes, host: str) -> bool:
        found = self._secrets.get(secret)
        if found is None or not self._may_speak(host):  # a neighbour in our own network proves nothing
            return False
        found.arrived = True
        return True

    def _may_speak(self, host: str) -> bool:
        return self._allow_private or is_public(host)

    # -- the task -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask, judge, wait; for ever."""
        self._hosts = self._own_hosts()
        task_status.started()
        while True:
            self._wake = trio.Event()
            try:
                await self._step()
            except Exception:  # the edge of the task: the node lives on, and tries again
                log.exception("looking at how others reach us failed")
                await trio.sleep(_RETRY_S)
            with trio.move_on_after(self._pause_s()):
                await self._wake.wait()

    async def _step(self) -> None:
        self._notice_changes()
        await self._observe()
        now = trio.current_time()
        if self._next_round is None and self._helpers():
            self._next_round = now + min(_GATHER_S, self._network.limits.reach_check_s)
        if self._next_round is not None and now >= self._next_round:
            await self._hold_round()

    def _pause_s(self) -> float:
        if self._next_round is None:
            return _LOOK_S
        return min(_LOOK_S, max(0.0, self._next_round - trio.current_time()))

    def _notice_changes(self) -> None:
        offset_s = self._wall_clock() - trio.current_time()
        if abs(offset_s - self._clock_offset_s) > _CLOCK_SET_S:
            self._clock_offset_s = offset_s
            self._clocks.forget()
            self._asked.clear()
        hosts = self._own_hosts()
        if hosts == self._hosts:
            return
        log.info("our addresses have changed: they are %s", ", ".join(hosts) or "none")
        self._hosts = hosts
        self._observed.forget()
        self._asked.clear()
        self._verdicts.reset()
        self._next_round, self._retries = None, 0
        self.on_change(self.report)

    def _own_hosts(self) -> tuple[str, ...]:
        return tuple(sorted({address.host for address in local_addresses(self._network.bound)}))

    # -- how are we seen ----------------------------------------------------------------------------------------------

    async def _observe(self) -> None:
        """Ask new connections how they see us, and what time it is; those that others made only when ours are few."""
        fresh = [each for each in self._direct() if each.key not in self._asked]
        ours = [each for each in fresh if not each.inbound][: max(0, _OBSERVERS - len(self._asked))]
        theirs = [each for each in fresh if each.inbound][: max(0, _CLOCKS - len(self._asked) - len(ours))]
        async with trio.open_nursery() as nursery:
            for connection in (*ours, *theirs):
                self._asked[connection.key] = connection
                nursery.start_soon(self._ask, connection, (), ())

    def _direct(self) -> list[Connection]:
        found = (self._network.connection_to(key) for key in self._network.connected_keys())
        return [each for each in found if each is not None and not each.relayed and each.remote_host]

    async def _ask(
        self, connection: Connection, ports: tuple[int, ...], handed_out: tuple[bytes, ...]
    ) -> Answer | None:
        """One question; None when the peer does not answer, or not sensibly."""
        sent_at = self._wall_clock()
        question = encode(Question(max(0, int(sent_at * 1000)), ports, handed_out))
        patience_s = ASK_DEADLINE_S + (self._network.limits.dial_s if ports else 0.0)
        try:
            with trio.fail_after(patience_s):
                answer = decode(Answer, await self._request(connection, question))
            self._learn(connection, answer, sent_at, in_passing=not ports)
        except (MeshError, DecodeError, trio.TooSlowError, ValueError) as error:
            log.debug("%s does not say how it sees us: %r", connection.key.hex()[:12], error)
            return None
        return answer

    def _learn(self, connection: Connection, answer: Answer, sent_at: float, *, in_passing: bool) -> None:
        voice = voice_of(connection.remote_host, connection.key)
        host = host_of(answer.host)
        if not connection.inbound and self._may_speak(host) and self._may_speak(connection.remote_host):
            kept = answer.port == connection.local_port if connection.local_port else None
            self._observed.note(voice, host, trio.current_time(), kept_port=kept)
        if in_passing:  # a dial-back takes seconds: too blurred to compare clocks
            self._clocks.note(voice, (sent_at + self._wall_clock()) / 2 - answer.clock_ms / 1000)
            self._judge_clock()

    def _judge_clock(self) -> None:
        skew_s = self._clocks.skew_s()
        is_off = skew_s is not None and abs(skew_s) > SKEW_TOLERATED_S
        if skew_s is not None and is_off and not self._warned:
            way = "ahead of" if skew_s > 0 else "behind"
            log.warning(
                "the clock of this machine is %.0f s %s those of its peers: set it, best by NTP", abs(skew_s), way
            )
        self._warned = is_off

    # -- can we be dialed ---------------------------------------------------------------------------------------------

    def _helpers(self) -> list[Connection]:
        """Peers to ask: ours before theirs, one of each voice before a second; in random order."""
        kinds = {address.kind for address in self._network.bound}
        usable = [
            each
            for each in self._direct()
            if self._may_speak(each.remote_host) and kind_of(host_of(each.remote_host)) in kinds
        ]
        self._rng.shuffle(usable)
        usable.sort(key=lambda each: each.inbound)
        by_voice = {voice_of(each.remote_host, each.key): each for each in reversed(usable)}
        chosen = [each for each in usable if by_voice[voice_of(each.remote_host, each.key)] is each]
        return chosen[: self._network.limits.reach_helpers]

    def _ports(self) -> tuple[int, ...]:
        mapped = self.mapped()
        candidates = [*self._announced, *([mapped] if mapped is not None else []), *self._network.bound]
        return tuple(dict.fromkeys(address.port for address in candidates if address.port))[: dialback.PORTS]

    async def _hold_round(self) -> None:
        asked = Round(strangers=self._strangers)
        self._strangers = set()
        ports = self._ports()
        async with trio.open_nursery() as nursery:
            for helper in self._helpers():
                nursery.start_soon(self._ask_to_dial, helper, ports, asked)
        self._checked_at = trio.current_time()
        if self._verdicts.judge(asked, self._trusted_hosts(), self._observed.agreed(self._checked_at)):
            log.info("others can%s: %s", _CAN[self._verdicts.status], self._verdicts.how)
            self.on_change(self.report)
        self._plan()

    async def _ask_to_dial(self, helper: Connection, ports: tuple[int, ...], asked: Round) -> None:
        handed_out = tuple(secrets.token_bytes(SECRET_BYTES) for _ in ports)
        expected = {secret: _Secret() for secret in handed_out}
        self._secrets.update(expected)
        try:
            answer = await self._ask(helper, ports, handed_out)
        finally:
            for secret in handed_out:
                del self._secrets[secret]
        if answer is not None:
            self._count(helper, answer, ports, [each.arrived for each in expected.values()], asked)

    def _count(
        self, helper: Connection, answer: Answer, ports: tuple[int, ...], arrived: list[bool], asked: Round
    ) -> None:
        """The voice of one peer: what came in counts, whatever it says; a claim to have dialed does not."""
        voice, host = voice_of(helper.remote_host, helper.key), host_of(answer.host)
        reached = {Address(kind_of(host), host, port) for port, came in zip(ports, arrived, strict=True) if came}
        if reached:
            asked.reached[voice] = reached
        elif FAILED in answer.results and DIALED not in answer.results:
            asked.failed.add(voice)

    def _trusted_hosts(self) -> set[str]:
        mapped = self.mapped()
        sure = {*self._hosts, *(a.host for a in self._announced)}
        return sure | ({mapped.host} if mapped is not None else set())

    @property
    def _is_unsure(self) -> bool:
        return self._verdicts.status == "unknown" or self._verdicts.is_contradicted

    def _plan(self) -> None:
        interval_s = self._network.limits.reach_check_s
        if self._is_unsure:
            delay_s = min(_RETRY_S * 2**self._retries, _RETRY_MAX_S, interval_s)
            self._retries = min(self._retries + 1, 16)
        else:
            delay_s, self._retries = interval_s, 0
            self._asked.clear()  # how they see us now
        self._next_round = trio.current_time() + delay_s * self._rng.uniform(0.8, 1.2)


def reach_check_of(network: Network, config: MeshConfig, request: Requester, rng: random.Random) -> ReachCheck:
    """The check of one node, and its answers to the checks of others; `request` asks one peer for a frame."""
    lab = counts_private(config)
    network.handlers[dialback.PROTOCOL] = dialback.DialBackServer(network, time.time, allow_private=lab).handle
    return ReachCheck(network, request, rng, announced=announced_by(config), allow_private=lab)
