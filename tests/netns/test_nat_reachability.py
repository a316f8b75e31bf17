"""What nodes find out about themselves behind real NATs: whether they can be dialed, where, and through what."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.netns


async def test_a_node_on_a_public_address_finds_out_that_it_can_be_dialed(internet) -> None:
    hosts = await internet.hosts(3)
    for host in hosts[1:]:
        await internet.connect(host, hosts[0])
    for host in hosts:
        found = await host.until(lambda info: info["reach"] == "public")
        assert all(address.startswith(f"/ip4/{host.host}/tcp/") for address in found["reached_at"])
        assert "came through" in found["how"]


@pytest.mark.parametrize("nat", ["keeps-ports", "random-ports"])
async def test_a_node_behind_a_nat_finds_out_that_it_cannot_and_how_it_is_seen(internet, nat: str) -> None:
    hosts = await internet.hosts(3)
    home = await internet.home(nat)
    await internet.connect(home, *hosts)
    found = await home.until(lambda info: info["reach"] == "private" and bool(info["observed"]))
    assert found["how"].startswith("none of ") and found["reached_at"] == []
    assert found["observed"] == [home.host]
    assert found["keeps_ports"] is (nat == "keeps-ports")
    assert abs(found["clock_skew_s"]) < 5


async def test_a_forwarded_port_is_found_without_being_configured(internet) -> None:
    """The router's own address, confirmed by peers, is what the node announces."""
    hosts = await internet.hosts(3)
    home = await internet.home("random-ports", forwards=True)
    await internet.connect(home, *hosts)
    found = await home.until(lambda info: info["reach"] == "public" and bool(info["reached_at"]))
    assert found["reached_at"] == [f"/ip4/{home.host}/tcp/4001"]
    assert found["addresses"][0].startswith(f"/ip4/{home.host}/tcp/4001/")
    await hosts[0].until(lambda info: home.key in info["peers"])


async def test_one_helper_is_enough_to_know_but_not_to_announce(internet) -> None:
    """A single peer could lie about the address; that our secret came in, it could not make up."""
    host = await internet.host()
    home = await internet.home("keeps-ports", forwards=True)
    await internet.connect(home, host)
    found = await home.until(lambda info: info["reach"] == "public")
    assert found["reached_at"] == []


async def test_a_router_with_upnp_is_asked_and_peers_confirm(internet) -> None:
    hosts = await internet.hosts(2)
    home = await internet.home("random-ports", upnp=True)
    await internet.connect(home, *hosts)
    found = await home.until(lambda info: info["reach"] == "public" and bool(info["reached_at"]))
    assert found["mapping"] == f"the router forwards {home.host} port 4001"
    assert found["reached_at"] == [f"/ip4/{home.host}/tcp/4001"]
