"""What a mesh may use: every size, rate, queue and time that a peer could otherwise choose."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MeshLimits:
    """Bounds of one node; the defaults suit a swarm of tens of nodes on one machine as well as a small server.

    Sizes are bytes, times seconds, rates per second. A peer that exceeds a rate is read more slowly; one that
    exceeds a size is cut off.
    """

    message_bytes: int = 256 * 1024  # payload of one gossip message
    messages_per_s: float = 500.0  # gossip messages of one peer, sustained; a duplicate counts a quarter
    messages_burst: int = 500
    bytes_per_s: float = 4 * 1024 * 1024  # gossip bytes of one peer, sustained
    bytes_burst: int = 8 * 1024 * 1024
    request_bytes: int = 16 * 1024 * 1024  # upper bound of any frame limit that a caller may ask for
    streams_per_connection: int = 256  # that a peer may have open towards us
    opens_per_s: float = 300.0  # streams that a peer may open, sustained
    opens_burst: int = 600
    frames_per_s: float = 100_000.0  # yamux frames of one peer, of any kind; more are read more slowly
    streams: int = 4096  # that all peers together may have open towards us
    connections: int = 160
    outbound_reserved: int = 32  # of them, that only we can fill by dialing
    connections_per_key: int = 4  # several processes with one key; twice that while they are settled
    connections_per_address: int = 16  # inbound, from an IPv4 address or an IPv6 /64
    connections_per_subnet: int = 48  # inbound, from an IPv4 /24 or an IPv6 /56
    private_factor: int = 8  # a loopback or private address may have so many times what a public one may; 1: the same
    busy_per_address: int = 4  # inbound, with an open request or tunnel, that go last; three times that for a subnet
    idle_s: float = 300.0  # a peer of no use for so long gives way when connections run out
    handshakes: int = 32  # unauthenticated connections at a time
    handshakes_per_address: int = 8  # half of all for a private address
    handshakes_per_s: float = 10.0  # of one address, sustained; five seconds' worth at once
    handshake_s: float = 10.0
    negotiation_s: float = 10.0  # multistream-select on a new stream
    dial_s: float = 5.0  # one address
    private_hello_s: float = 0.9  # dialing in a private swarm: the peer's nonce, and then its first bytes
    keepalive_s: float = 15.0  # of silence, then we ping; after 1.75 times that a connection is dead: within 30 s
    buffered_bytes: int = 24 * 1024 * 1024  # received on streams and not read yet, all peers; one may have a third
    sending_bytes: int = 32 * 1024 * 1024  # written to streams and not taken by the system, all peers
    served_bytes: int = 64 * 1024 * 1024  # of requests and answers that served streams hold, all peers together
    outbound_frames: int = 512  # gossip messages waiting for one peer, the oldest of the least important give way
    outbound_bytes: int = 2 * 1024 * 1024
    outbound_all_bytes: int = 16 * 1024 * 1024  # of all peers; what waits for several counts once
    flush_s: float = 0.04  # about so long gossip gathers before it is sent; our own does not when we have been quiet
    spread_s: float = 0.2  # at most so long waits a message that its receiver has probably got from others
    inbound_messages: int = 2048  # waiting for a verdict, the least important give way; of each heavy topic a quarter
    inbound_bytes: int = 6 * 1024 * 1024
    unfinished_bytes: int = 8 * 1024 * 1024  # of gossip RPCs that have not arrived whole, all peers
    inbound_wait_s: float = 2.0  # messages that wait longer are dropped, but for the most important
    send_stall_s: float = 30.0  # a peer that does not read its gossip for so long is disconnected
    seen_messages: int = 65536
    seen_s: float = 120.0
    authors: int = 4096  # whose newest sequence number is known, against replays
    author_s: float = 600.0  # after such a silence an author may begin anew, if its clock was set back
    heartbeat_s: float = 1.0
    ban_s: float = 60.0  # the first ban; each further one is five times as long
    ban_max_s: float = 86_400.0
    remembered_peers: int = 4096  # accounts of misbehaviour, as many again of addresses
    known_peers: int = 4096  # address book, with the signed record of each; one source may bring a quarter of them
    addresses_per_peer: int = 8
    target_peers: int = 8  # connections that the node looks for by itself
    exchange_s: float = 30.0  # interval of asking a random peer for more peers
    record_s: float = 7200.0  # for how long our signed addresses are valid; they are renewed in a quarter of that
    interfaces_s: float = 30.0  # interval of looking whether our own addresses have changed
    lan_peers: int = 64  # that mDNS may have found at a time
    reach_check_s: float = 900.0  # interval of asking peers to dial us back
    reach_helpers: int = 5  # peers that are asked
    dialbacks: int = 8  # dials for peers that ask, at a time
    dialbacks_per_s: float = 2.0
    relays: int = 3  # at which a node that cannot be dialed keeps reservations
    punches_per_s: float = 0.1  # holes that a peer may ask us to punch, sustained
    # What we carry as a relay. A member is whom the node says, or else whoever holds a reservation with us.
    relay_reservations: int = 128
    relay_reservations_per_address: int = 8  # four times that for an IPv4 /24 or an IPv6 /56
    relay_reservation_s: float = 3600.0
    relay_asks_per_s: float = 2.0  # reservations and circuits that a peer may ask for, sustained
    relay_circuits: int = 128  # half of them at most for strangers
    relay_circuits_per_peer: int = 16  # at either end
    relay_bytes_per_s: float = 16 * 1024 * 1024  # all circuits together
    relay_member_bytes: int = 8 * 1024 * 1024 * 1024  # of a circuit between members, in each direction
    relay_member_s: float = 4 * 3600.0
    relay_stranger_bytes: int = 2 * 1024 * 1024  # of any other circuit: to talk, to punch holes; 0: no such circuit
    relay_stranger_s: float = 300.0


@dataclass(frozen=True)
class MeshConfig:
    """What one node's mesh is.

    `listen` are multiaddrs ``/ip4/<address>/tcp/<port>`` (port 0: any free one), `network` is the network's name in
    topics, `announce` replaces the addresses that the node tells others, `allow_private` says whether loopback and
    private addresses of others are dialed (default: when the node itself listens on one).

    `pre_shared_key` (32 bytes) makes the swarm private, `relay` says whether we carry others' connections (default:
    when we are reachable from outside), `upnp` asks the router to forward our port, `mdns` looks for peers on the
    local network (default: when the node listens on more than loopback).
    """

    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    network: str = "testnet"
    announce: tuple[str, ...] = ()
    allow_private: bool | None = None
    pre_shared_key: bytes | None = field(default=None, repr=False)
    relay: bool | None = None
    upnp: bool | None = None
    mdns: bool | None = None
    limits: MeshLimits = field(default_factory=MeshLimits)


class TokenBucket:
    """Rate limit with a burst; starts full. Times are seconds of any monotonic clock."""

    __slots__ = ("_burst", "_rate_per_s", "_tokens", "_updated")

    def __init__(self, rate_per_s: float, burst: float, now: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._tokens = float(burst)
        self._updated = now

    def take(self, amount: float, now: float) -> float:
        """Take `amount` in any case; the seconds to wait until the bucket is no longer in debt."""
        self._refill(now)
        self._tokens -= amount
        return 0.0 if self._tokens >= 0 else -self._tokens / self._rate_per_s

    def try_take(self, amount: float, now: float) -> bool:
        """Take `amount` if it is there."""
        self._refill(now)
        if self._tokens < amount:
            return False
        self._tokens -= amount
        return True

    def _refill(self, now: float) -> None:
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._updated) * self._rate_per_s)
        self._updated = now


class SharedBytes:
    """A store of bytes that many holders take from and give back to; one holder gets an eighth of it at most."""

    def __init__(self, most: int) -> None:
        self._most, self._of_one = most, most // 8
        self._held: dict[bytes, int] = {}
        self.total = 0

    def try_take(self, holder: bytes, amount: int, own: int = 0) -> bool:
        """Take `amount` if it is there.

        What is larger than an eighth of all goes to a holder that has nothing else than `own`, for the same purpose.
        """
        held = self._held.get(holder, 0)
        if self.total + amount > self._most or (held > own and held + amount > self._of_one):
            return False
        self._held[holder] = held + amount
        self.total += amount
        return True

    def give_back(self, holder: bytes, amount: int) -> None:
        """What was taken is free again."""
        self.total -= amount
        self._held[holder] -= amount
        if not self._held[holder]:
            del self._held[holder]


class PeerBuckets:
    """A token bucket for each peer; those of the peers heard of least recently are forgotten."""

    def __init__(self, rate_per_s: float, burst: float, *, peers: int = 4096) -> None:
        self._rate_per_s, self._burst, self._peers = rate_per_s, burst, peers
        self._buckets: OrderedDict[bytes, TokenBucket] = OrderedDict()

    def try_take(self, peer: bytes, now: float) -> bool:
        """Take one token of this peer if it has one."""
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = TokenBucket(self._rate_per_s, self._burst, now)
            if len(self._buckets) > self._peers:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(peer)
        return bucket.try_take(1, now)
