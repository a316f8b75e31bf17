"""Start-up, readable from top to bottom; and the clean end."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from kaisar_p2p.errors import ConfigError, DecodeError, KaisarError, StoreError
from kaisar_p2p.hardware.probe import Machine as Hardware
from kaisar_p2p.hardware.probe import probe
from kaisar_p2p.hardware.prove import select_backend
from kaisar_p2p.identity import Keystore, MachineKey, Wallet
from kaisar_p2p.ledger import EmbeddedLedger, open_embedded
from kaisar_p2p.mesh import Mesh, open_mesh
from kaisar_p2p.runtime.interface import ContainerRuntime
from kaisar_p2p.wire.crypto import sha256
from node.api.server import serve_api
from node.chain import CallSubmitter, Chain
from node.clock import Clock
from node.compute import Computer
from node.config import Config
from node.containers import Containers
from node.driver import Driver
from node.effects import NodeEffects
from node.inbox import Inbox
from node.index import Index
from node.mesh_settings import mesh_config
from node.node import Node
from node.peers import PeerKeeper
from node.registration import Registration, offered_spec
from node.relay_members import is_relay_member
from node.roles import RoleContext, Served, roles_mask
from node.roles.all import ROLES
from node.store import NodeStore
from node.topics import Switchboard
from node.tunnels import TunnelClient, TunnelServer
from protocols.adverts import MAX_ADDRS
from protocols.deploy import TUNNEL_PROTOCOL
from protocols.genesis import DOCUMENT_BYTES
from protocols.lease_client import LeaseClientMachine
from protocols.machine import Machine
from protocols.onboarding import Onboarding
from protocols.presence import Presence

log = logging.getLogger(__name__)

PRUNE_EVERY_S = 600.0
KEEP = {"body": 64, "certificate": 20_000, "workload": 1_000, "lease": 1_000, "order": 1_000, "watch": 1_000}


def unlock_keys(config: Config, passphrase: str | None) -> tuple[MachineKey, Wallet]:
    """The machine key and the owner wallet of a data directory; WrongPassphrase or UnknownWallet say what is wrong."""
    keystore = Keystore(config.keys_path)
    return keystore.unlock_machine_key(passphrase), keystore.unlock(config.node.wallet, passphrase)


def check_network(config: Config, network: bytes) -> None:
    """ConfigError unless the ledger of `network` (32 bytes) is the one of this data directory's genesis document.

    Duties and offers are bound to a network: on another one, a node would sign what it must not.
    """
    path = config.genesis_path
    try:
        with path.open("rb") as file:
            document = file.read(DOCUMENT_BYTES + 1)
    except OSError as error:
        hint = "restore it, or set network.genesis: it says which network this node belongs to"
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    if sha256(document) != network:
        hint = "set ledger.path to this network's file; for another network, make another data directory"
        raise ConfigError(f"{config.ledger_path} is the ledger of another network than {path}", hint=hint)


async def run_node(config: Config, keys: MachineKey, wallet: Wallet, ready: Callable[[Node], None]) -> None:
    """Run a node until SIGINT, SIGTERM or SIGHUP; `ready` is called once its API answers.

    The caller holds the lock of the data directory. Raises KaisarError when the node cannot start or go on.
    """
    with _only_cause():
        # 1. what this node keeps, and the time
        clock, inbox = Clock(), Inbox()
        store = NodeStore(config.data_directory / "node.sqlite")
        try:
            # 2. the ledger, and the state that it adds up to
            async with open_embedded(config.ledger_path, poll_s=config.ledger.poll_s) as ledger:
                check_network(config, ledger.network)
                await _run_on_ledger(config, keys, wallet, ready, store, clock, inbox, ledger)
        finally:
            store.close()


async def _run_on_ledger(
    config: Config,
    keys: MachineKey,
    wallet: Wallet,
    ready: Callable[[Node], None],
    store: NodeStore,
    clock: Clock,
    inbox: Inbox,
    ledger: EmbeddedLedger,
) -> None:
    chain = Chain(ledger, inbox, clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chain.run)
        # 3. who we are: hardware and runtime of a provider
        roles = config.node.roles
        hardware = probe(config.data_directory) if "provider" in roles else None
        runtime = await _runtime(config, keys) if hardware is not None else None
        # 4. the mesh
        network = ledger.network.hex()[:16]
        async with open_mesh(mesh_config(config, network), keys.seed, store) as mesh:
            mesh.relay_members(lambda key: is_relay_member(chain.state, key))
            node = _assemble(config, keys, wallet, chain, store, clock, inbox, mesh, runtime)
            machines, registration, onboarding = _machines(node, hardware)
            # 5. effects, topics, served protocols, machines
            await _start(nursery, node, machines)
            # 6. the API
            await nursery.start(serve_api, node)
            nursery.start_soon(_stop_on_signal, node)
            nursery.start_soon(_prune, node)
            if registration is not None:
                nursery.start_soon(registration.run, node, onboarding)
            ready(node)
            await node.stopping.wait()
            log.info("stopping: containers keep running, state is flushed")
            nursery.cancel_scope.cancel()


async def _runtime(config: Config, keys: MachineKey) -> ContainerRuntime:
    from kaisar_p2p.runtime import select_runtime  # only providers pay for importing it

    base = config.data_directory / "leases"
    return await select_runtime(config.provider.runtime, base, keys.public_key.hex()[:16])


def _assemble(
    config: Config,
    keys: MachineKey,
    wallet: Wallet,
    chain: Chain,
    store: NodeStore,
    clock: Clock,
    inbox: Inbox,
    mesh: Mesh,
    runtime: ContainerRuntime | None,
) -> Node:
    switchboard = Switchboard(inbox, lambda: chain.state, keys.public_key, clock.now)
    tunnels = TunnelClient(mesh)
    lease_client = LeaseClientMachine(keys.key_pair, chain.ledger.network, store.items("order"))
    effects = NodeEffects(
        mesh=mesh,
        store=store,
        inbox=inbox,
        clock=clock,
        computer=Computer(select_backend("auto" if "provider" in config.node.roles else "numpy")),  # others only check
        submitter=CallSubmitter(chain, wallet),
        containers=Containers(runtime, inbox) if runtime is not None else None,
        prober=tunnels,
        switchboard=switchboard,
    )
    return Node(
        config=config,
        roles=config.node.roles,
        machine_key=keys,
        wallet=wallet,
        chain=chain,
        mesh=mesh,
        store=store,
        index=Index(own_lease=lease_client.lease),
        inbox=inbox,
        clock=clock,
        effects=effects,
        tunnels=tunnels,
        runtime=runtime,
        lease_client=lease_client,
        started_at=clock.now(),
    )


def _machines(node: Node, hardware: Hardware | None) -> tuple[list[Machine], Registration | None, Onboarding]:
    keys, owner, roles = node.machine_key.key_pair, node.wallet.public_key, node.roles
    spec = offered_spec(node.config, hardware) if hardware is not None else None
    context = RoleContext(
        keys=keys,
        owner=owner,
        network=node.chain.ledger.network,
        store=node.store,
        entropy=secrets.token_bytes,
        runtime=node.runtime.name if node.runtime is not None else "",
        max_leases=node.config.provider.max_leases,
        wrong_tiles=_fault("wrong_tiles"),
    )
    mask = roles_mask(roles)
    announce = "bootstrap" in roles
    onboarding = Onboarding(
        keys, owner, mask, spec, node.config.provider.price_planck_per_hour, node.mesh.addrs[:MAX_ADDRS], announce
    )
    node.mesh.on_addresses_changed = lambda: setattr(onboarding, "addrs", node.mesh.addrs[:MAX_ADDRS])
    onboarding.hold = "provider" in roles
    presence = Presence(keys, owner, mask, lambda: node.mesh.addrs, context.runtime)
    machines: list[Machine] = [
        PeerKeeper(node.mesh, node.config.network.join),
        node.index,
        presence,
        onboarding,
        node.lease_client,
        node.tunnels,
    ]
    for role in (*roles, "everybody"):
        try:
            machines += ROLES[role].machines(context)
        except DecodeError as error:
            raise StoreError(
                f"what the {role} role has stored cannot be read: {error.message}",
                hint="another version of kaisar wrote node.sqlite: use that one, or move the file away",
            ) from error
    registration = Registration(spec, hardware) if spec is not None and hardware is not None else None
    return machines, registration, onboarding


async def _start(nursery: trio.Nursery, node: Node, machines: list[Machine]) -> None:
    await nursery.start(node.effects.run)
    await nursery.start(node.effects.switchboard.run, node.mesh)
    nursery.start_soon(node.tunnels.run)
    served = {each.protocol: each for role in (*node.roles, "everybody") for each in ROLES[role].serves}
    for each in served.values():
        _serve(node, each)
    if node.runtime is not None and node.effects.containers is not None:
        await nursery.start(node.effects.containers.run)
        server = TunnelServer(node.runtime, node.key, lambda: node.chain.state)
        node.mesh.serve(TUNNEL_PROTOCOL, server.handle, max_frame_bytes=1 << 17, per_peer=64, rate_per_s=50.0)
    nursery.start_soon(Driver(machines, node.inbox, node.effects, node.clock).run)


def _serve(node: Node, each: Served) -> None:
    node.mesh.serve(
        each.protocol,
        functools.partial(node.effects.serve, each.protocol),
        max_frame_bytes=each.max_frame_bytes,
        per_peer=each.per_peer,
        rate_per_s=each.rate_per_s,
    )


def stop_signals() -> tuple[signal.Signals, ...]:
    """What ends a node cleanly. A terminal that closes does, unless its SIGHUP is ignored, as under `nohup`."""
    hang_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hang_up)


async def _stop_on_signal(node: Node) -> None:
    with trio.open_signal_receiver(*stop_signals()) as signals:
        async for received in signals:
            log.info("received %s", signal.Signals(received).name)
            node.stop()


async def _prune(node: Node) -> None:
    while True:
        await trio.sleep(PRUNE_EVERY_S)
        try:
            await trio.to_thread.run_sync(node.store.prune, node.clock.now(), KEEP)
        except KaisarError as error:
            log.warning("%s", error)


def _fault(name: str) -> int:
    """Faults for networks of adversaries: only from the environment, never from a configuration file."""
    text = os.environ.get(f"KAISAR_FAULT_{name.upper()}", "0")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"KAISAR_FAULT_{name.upper()} is {text!r}", hint="it must be an integer") from None


@contextmanager
def _only_cause() -> Iterator[None]:
    """Nurseries wrap errors in groups; the user needs the one that started it."""
    try:
        yield
    except BaseExceptionGroup as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = next((e for e in cause.exceptions if isinstance(e, KaisarError)), cause.exceptions[0])
        raise cause from group
