"""Port mapping against a router made of an SSDP responder and a SOAP server on loopback."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest
import trio

from kaisar_p2p.mesh import MeshConfig, open_mesh
from kaisar_p2p.mesh.discovery.addresses import Address
from kaisar_p2p.mesh.reach import igd, upnp
from kaisar_p2p.mesh.reach.igd import RouterRefused, find_gateway
from kaisar_p2p.mesh.reach.upnp import PortMapping, wants_mapping

WAN = "urn:schemas-upnp-org:service:WANIPConnection:1"


async def eventually(condition, within_s: float = 15.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.005)


@dataclass
class FakeRouter:
    """Answers to a search and to the three calls; what is odd about it is set by the test."""

    ssdp: tuple[str, int] = ("", 0)
    external: str = "203.0.113.9"
    service: str = WAN
    control: str = "/control"
    location: str = ""
    only_permanent: bool = False
    taken: set[int] = field(default_factory=set)
    answer: bytes | None = None  # instead of all HTTP answers
    stalls: bool = False
    mapped: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, self._serve, 0)
            port = next(one.socket.getsockname()[1] for one in listeners)
            self.location = self.location or f"http://127.0.0.1:{port}/rootDesc.xml"
            with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as udp:
                await udp.bind(("127.0.0.1", 0))
                self.ssdp = udp.getsockname()
                task_status.started()
                while True:
                    question, sender = await udp.recvfrom(2048)
                    assert question.startswith(b"M-SEARCH * HTTP/1.1\r\n")
                    await udp.sendto(b"HTTP/1.1 200 OK\r\nLocation: " + self.location.encode() + b"\r\n\r\n", sender)

    async def _serve(self, stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some() or b"\r\n\r\n"
        head, _, body = request.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        while length and len(body) < int(length[1]):
            body += await stream.receive_some()
        if self.stalls:
            await trio.sleep_forever()
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(self.answer if self.answer is not None else self._answer(head, body.decode()))

    def _answer(self, head: bytes, body: str) -> bytes:
        if head.startswith(b"GET /rootDesc.xml"):
            return _ok(
                f"<root><service><serviceType>urn:x:Layer3Forwarding:1</serviceType><controlURL>/l3</controlURL>"
                f"</service><service><serviceType>{self.service}</serviceType>"
                f"<controlURL>{self.control}</controlURL></service></root>"
            )
        action = re.search(rb'SOAPAction: "[^#]*#(\w+)"', head)
        assert action is not None
        if action[1] == b"GetExternalIPAddress":
            return _ok(f"<s:Body><NewExternalIPAddress>{self.external}</NewExternalIPAddress></s:Body>")
        port = int(_field(body, "NewExternalPort"))
        if action[1] == b"DeletePortMapping":
            self.removed.append(port)
            self.mapped.pop(port)
            return _ok("")
        lease_s = int(_field(body, "NewLeaseDuration"))
        if port in self.taken:
            return _error(718, "ConflictInMappingEntry")
        if self.only_permanent and lease_s:
            return _error(725, "OnlyPermanentLeasesSupported")
        self.mapped[port] = (_field(body, "NewInternalClient"), int(_field(body, "NewInternalPort")), lease_s)
        return _ok("")


def _ok(text: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()


def _error(code: int, text: str) -> bytes:
    body = f"<s:Fault><errorCode>{code}</errorCode><errorDescription>{text}</errorDescription></s:Fault>"
    return f"HTTP/1.1 500 Internal Server Error\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def _field(body: str, name: str) -> str:
    found = re.search(f"<{name}>([^<]*)</{name}>", body)
    assert found is not None
    return found[1]


@pytest.fixture
async def router(nursery) -> AsyncIterator[FakeRouter]:
    found = FakeRouter()
    await nursery.start(found.run)
    yield found


def mapping(router: FakeRouter, port: int = 4001) -> PortMapping:
    return PortMapping(lambda: (Address("ip4", "127.0.0.1", port),), random.Random(1), target=router.ssdp)


async def test_a_port_is_mapped_with_a_lease_and_given_back(router: FakeRouter, nursery) -> None:
    one, changes = mapping(router), []
    one.on_change = lambda: changes.append(one.external)
    async with trio.open_nursery() as inner:
        await inner.start(one.run)
        await eventually(lambda: one.external is not None)
        assert router.mapped == {4001: ("127.0.0.1", 4001, upnp.LEASE_S)}
        assert "the router forwards 203.0.113.9 port 4001" in one.explained
        inner.cancel_scope.cancel()
    assert changes == [Address("ip4", "203.0.113.9", 4001)]
    assert router.removed == [4001]
    assert router.mapped == {}


async def test_another_network_is_noticed_when_woken(router: FakeRouter, nursery) -> None:
    one = mapping(router)
    nursery.start_soon(one.run)
    await eventually(lambda: one.external is not None)
    router.mapped.clear()  # it is another router
    one.wake()
    await eventually(lambda: 4001 in router.mapped)


async def test_a_lease_is_renewed(router: FakeRouter, nursery, monkeypatch) -> None:
    monkeypatch.setattr(upnp, "LEASE_S", 1)
    one = mapping(router)
    nursery.start_soon(one.run)
    await eventually(lambda: one.external is not None)
    router.mapped.clear()  # as a router that was restarted
    await eventually(lambda: 4001 in router.mapped)
    router.external = "203.0.113.77"
    await eventually(lambda: one.external == Address("ip4", "203.0.113.77", 4001))


async def test_a_second_node_in_the_same_network_gets_another_port(router: FakeRouter, nursery) -> None:
    router.taken = {4001}
    one = mapping(router)
    nursery.start_soon(one.run)
    await eventually(lambda: one.external is not None)
    ((external, (_, internal, _)),) = router.mapped.items()
    assert external != 4001 and internal == 4001
    assert one.external == Address("ip4", "203.0.113.9", external)


async def test_a_router_without_leases_is_asked_for_a_permanent_mapping(router: FakeRouter, nursery) -> None:
    router.only_permanent = True
    one = mapping(router)
    nursery.start_soon(one.run)
    await eventually(lambda: one.external is not None)
    assert router.mapped[4001][2] == 0


async def test_a_router_behind_a_router_says_so(router: FakeRouter, nursery) -> None:
    router.external = "100.64.3.4"
    one = mapping(router)
    nursery.start_soon(one.run)
    await eventually(lambda: one.external is not None)
    assert one.explained.endswith("which is itself behind another router")


async def test_a_mapping_that_is_lost_is_no_address_any_more(router: FakeRouter, nursery, monkeypatch) -> None:
    monkeypatch.setattr(upnp, "LEASE_S", 1)
    one = mapping(router)
    nursery.start_soon(one.run)
    await eventually(lambda: one.external is not None)
    router.answer = b"HTTP/1.1 500 no\r\n\r\n"
    await eventually(lambda: one.external is None)
    assert "refuses" in one.explained


async def test_no_router_is_explained_and_nothing_is_logged(caplog) -> None:
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as silent:
        await silent.bind(("127.0.0.1", 0))
        with pytest.raises(RouterRefused, match="no router in this network answers"):
            await find_gateway("127.0.0.1", wait_s=0.2, target=silent.getsockname())
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


@pytest.mark.parametrize(
    "location",
    [
        "http://192.0.2.1:80/x.xml",
        "http://127.0.0.2:1/x.xml",
        "https://127.0.0.1/x",
        "file:///etc/passwd",
        "http://[::1",
    ],
)
async def test_a_device_may_only_describe_itself_where_it_answers_from(router: FakeRouter, location: str) -> None:
    router.location = location
    with pytest.raises(RouterRefused, match="no router in this network answers"):
        await find_gateway("127.0.0.1", wait_s=0.3, target=router.ssdp)


@pytest.mark.parametrize("control", ["http://192.0.2.1/control", "//192.0.2.1/control", "ftp://127.0.0.1/"])
async def test_a_control_address_elsewhere_is_not_called(router: FakeRouter, control: str) -> None:
    router.control = control
    with pytest.raises(RouterRefused):
        await find_gateway("127.0.0.1", wait_s=0.3, target=router.ssdp)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff" * 5000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n<service>",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"<service>" * 20_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_000,
        b"HTTP/1.1 abc OK\r\n\r\n",
    ],
    ids=["nothing", "bytes", "length", "unclosed", "huge", "status"],
)
async def test_a_router_that_answers_garbage_is_no_router(router: FakeRouter, answer: bytes) -> None:
    router.answer = answer
    with pytest.raises(RouterRefused):
        await find_gateway("127.0.0.1", wait_s=0.5, target=router.ssdp)


async def test_a_router_that_stalls_is_given_up(router: FakeRouter, monkeypatch) -> None:
    gateway = await find_gateway("127.0.0.1", target=router.ssdp)
    monkeypatch.setattr(igd, "_CALL_S", 0.1)
    router.stalls = True
    with pytest.raises(RouterRefused, match="does not answer"):
        await gateway.external_host()


async def test_a_mesh_maps_its_port_and_gives_it_back(router: FakeRouter, monkeypatch) -> None:
    monkeypatch.setattr(upnp, "SSDP", router.ssdp)
    async with open_mesh(MeshConfig(upnp=True), bytes(32)) as mesh:
        await eventually(lambda: bool(router.mapped))
        await eventually(lambda: "the router forwards" in mesh.port_mapping())
        ((_, (host, port, _)),) = router.mapped.items()
        assert mesh.addrs[0].startswith(f"/ip4/{host}/tcp/{port}/")
    assert router.mapped == {}


def test_a_router_is_asked_only_where_one_can_help() -> None:
    config = MeshConfig()
    loopback, inside, outside = (Address("ip4", host, 4001) for host in ("127.0.0.1", "192.168.1.5", "8.8.8.8"))
    assert not wants_mapping(config, (loopback,))
    assert wants_mapping(config, (inside,))
    assert wants_mapping(config, (inside, loopback))
    assert not wants_mapping(config, (inside, outside))
    assert not wants_mapping(config, (outside,))
    assert not wants_mapping(replace(config, upnp=False), (inside,))
    assert wants_mapping(replace(config, upnp=True), (loopback,))
