"""The loopback API on a real socket: who may use it, what it refuses, what it answers."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaisar_p2p.errors import NodeUnavailable, OrderRefused
from kaisar_p2p.identity import ss58_encode
from node.api.address import ApiAddress, read_address, remove_address, write_address
from node.api.guard import MAX_BODY_BYTES
from protocols.interpreter import calls
from protocols.params import KAI
from tests.node.conftest import KEY, ORDER, STRANGER

GETS = [
    "status", "peers", "workers", "checks", "epochs", "events", "registration", "account/me", "rewards", "metrics",
    "orders", f"orders/{ORDER.hex()}", f"orders/{ORDER.hex()}/events", "leases", f"leases/{ORDER.hex()}/logs",
]  # fmt: skip
WRITES = [
    ("POST", "orders"), ("DELETE", f"orders/{ORDER.hex()}"), ("POST", f"leases/{ORDER.hex()}/connect"),
    ("POST", f"leases/{ORDER.hex()}/exec"), ("POST", "transfer"), ("POST", "stake"), ("POST", "licence"),
    ("POST", "worker/retire"), ("POST", "rewards/claim"),
]  # fmt: skip
PLACE: dict[str, Any] = {
    "resources": {"cpu_cores": 1, "memory_mb": 256},
    "workload": {"command": ["{python}", "-m", "http.server"], "environment": {"B": "2", "A": "1"}, "ports": [8080]},
    "duration_s": 600,
    "max_price_planck_per_hour": str(KAI),
}


@pytest.fixture
def api(served: Any) -> Any:
    headers = {"Authorization": f"Bearer {served.address.token}"}
    with httpx.Client(base_url=served.address.url + "/v1", headers=headers, trust_env=False, timeout=20) as client:
        yield client


# ── who may use it ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer wrong", "Basic x", "Bearer é"])
def test_without_the_token_every_route_is_refused(served: Any, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    with httpx.Client(base_url=served.address.url + "/v1", headers=headers, trust_env=False) as client:
        for method, path in [*(("GET", path) for path in GETS), *WRITES, ("GET", "unknown")]:
            answer = client.request(method, path)
            assert answer.status_code == 401, path
            assert answer.json()["error"]
    assert served.node.calls == []


def test_the_token_must_be_sent_once(served: Any) -> None:
    token = f"Bearer {served.address.token}"
    answer = httpx.get(
        served.address.url + "/v1/status", headers=[("Authorization", token), ("Authorization", token)], trust_env=False
    )
    assert answer.status_code == 401


@pytest.mark.parametrize("host", ["kaisar.example", "127.0.0.1.example.com", "10.0.0.1:80", "0.0.0.0", "", "[::2]:1"])
def test_a_name_that_is_not_loopback_is_refused(api: httpx.Client, host: str) -> None:
    answer = api.get("status", headers={"Host": host})
    assert answer.status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.5.5.5:99", "[::1]", "[::1]:80"])
def test_loopback_names_are_let_in(api: httpx.Client, host: str) -> None:
    assert api.get("status", headers={"Host": host}).status_code == 200


def test_no_page_of_another_origin_can_read_an_answer(api: httpx.Client) -> None:
    answer = api.get("status", headers={"Origin": "https://example.com"})
    assert not [name for name in answer.headers if name.lower().startswith("access-control-")]
    assert api.options("status", headers={"Origin": "https://example.com"}).status_code == 405


def test_the_address_file_is_private_and_goes_with_the_node(served: Any) -> None:
    path = served.directory / "api.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_address(served.directory) == served.address
    assert served.address.pid == os.getpid()
    assert served.address.token not in repr(served.address)
    served.soon(served.scope.cancel)
    _eventually(lambda: not path.exists())


def test_another_runs_address_file_is_left_alone(tmp_path: Path) -> None:
    mine, other = ApiAddress("http://127.0.0.1:1", "a", 1), ApiAddress("http://127.0.0.1:2", "b", 2)
    write_address(tmp_path, other)
    remove_address(tmp_path, mine)
    assert read_address(tmp_path) == other


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"url": 1, "token": "x", "pid": 2}', "\0"])
def test_a_damaged_address_file_means_no_node(tmp_path: Path, text: str) -> None:
    (tmp_path / "api.json").write_text(text)
    with pytest.raises(NodeUnavailable, match="no node answers"):
        read_address(tmp_path)


# ── bad requests ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unknown_routes_and_methods(api: httpx.Client) -> None:
    assert (api.get("nothing").status_code, api.get("nothing").json()["error"]) == (404, "no route /v1/nothing")
    assert api.post("status").status_code == 405
    assert api.get("../etc/passwd").status_code == 404


def test_a_body_over_the_limit_is_refused(api: httpx.Client) -> None:
    assert api.post("transfer", content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413


def test_a_body_over_the_limit_is_refused_when_its_length_is_not_announced(api: httpx.Client) -> None:
    chunks = (b" " * 65_536 for _ in range(MAX_BODY_BYTES // 65_536 + 2))
    assert api.post("transfer", content=chunks).status_code == 413


@pytest.mark.parametrize("body", ["{", "[]", "1", '"x"', "\xff", "{" * 100_000, '{"a": NaN}', '{"to": 1}'])
def test_what_is_not_the_expected_json_is_refused(served: Any, api: httpx.Client, body: str) -> None:
    for path in ("transfer", "orders", f"leases/{ORDER.hex()}/connect"):
        answer = api.post(path, content=body.encode("latin-1"))
        assert answer.status_code == 400
        assert set(answer.json()) == {"error", "hint"}
    assert served.node.calls == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@given(value=JSON, path=st.sampled_from([path for method, path in WRITES if method == "POST" and "claim" not in path]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_json_gets_an_answer(api: httpx.Client, value: object, path: str) -> None:
    assert api.post(path, json=value).status_code in (200, 400)


@given(names=st.dictionaries(st.sampled_from(sorted({*PLACE, "x"})), JSON, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_order_gets_an_answer(api: httpx.Client, names: dict[str, object]) -> None:
    assert api.post("orders", json={**PLACE, **names}).status_code in (201, 400)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resources": {"cpu_cores": 0, "memory_mb": 1}}, "cpu_cores must be a whole number from 1"),
        ({"resources": {"cpu_cores": 1}}, "memory_mb must be"),
        ({"resources": {"cpus": 1}}, "unknown field 'cpus'"),
        ({"workload": {"command": []}}, "needs an image or a command"),
        ({"workload": {"command": ["x"], "ports": [0]}}, "ports must be"),
        ({"workload": {"command": ["x"], "ports": [80, 80]}}, "ports must be"),
        ({"workload": {"command": ["x" * 5000]}}, "too much for one request"),
        ({"workload": {"command": ["x"], "environment": {"A": 1}}}, "environment must be"),
        ({"duration_s": True}, "duration_s must be"),
        ({"max_price_planck_per_hour": 5}, "must be an amount in planck as text"),
        ({"max_price_planck_per_hour": "-5"}, "must be an amount in planck as text"),
        ({"points_planck": "9" * 39}, "must be an amount in planck as text"),
    ],
)
def test_an_order_says_what_is_wrong_with_it(served: Any, api: httpx.Client, change: Any, said: str) -> None:
    answer = api.post("orders", json={**PLACE, **change})
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert served.node.placed == []


def test_a_mistake_of_ours_is_answered_and_the_node_lives_on(served: Any, api: httpx.Client) -> None:
    state, served.node.chain.state = served.node.chain.state, None
    answer = api.get("workers")
    assert (answer.status_code, set(answer.json())) == (500, {"error", "hint"})
    assert "NoneType" not in answer.text
    served.node.chain.state = state
    assert api.get("workers").status_code == 200


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_status(api: httpx.Client) -> None:
    answer = api.get("status").json()
    assert (answer["key"], answer["roles"]) == (KEY.hex(), ["client", "checker"])
    assert (answer["balance_kai"], answer["balance_planck"]) == ("900", str(900 * KAI))
    assert answer["chain"]["block"] == 30
    assert answer["uptime_s"] == 90


def test_peers_workers_checks_epochs(api: httpx.Client) -> None:
    [peer] = api.get("peers").json()
    assert (peer["roles"], peer["rtt_ms"]) == (["provider"], 2.0)
    [worker] = api.get("workers").json()
    assert (worker["status"], worker["checks"], worker["checks_passed"], worker["online"]) == ("active", 2, 1, True)
    assert [check["slot"] for check in api.get("checks").json()] == [4, 3]
    assert len(api.get("checks?limit=1").json()) == 1
    assert api.get(f"checks?worker={KEY.hex()}").json() == []
    assert api.get("checks?worker=xyz").status_code == 400
    assert api.get("checks?limit=0").status_code == 400
    assert api.get("checks?limitt=1").json()["hint"] == "did you mean limit?"
    [epoch] = api.get("epochs").json()
    assert (epoch["epoch"], epoch["anchor_bytes"], epoch["minted_kai"]) == (0, 900, "100")


def test_accounts(api: httpx.Client) -> None:
    assert api.get("account/me").json()["machines"][0]["key"] == KEY.hex()
    assert api.get(f"account/{ss58_encode(STRANGER)}").json()["balance_planck"] == "0"
    assert api.get("account/nobody").status_code == 400


def test_metrics_are_prometheus_text(api: httpx.Client) -> None:
    text = api.get("metrics").text
    assert 'kaisar_gossip_messages_total{topic="advert",verdict="accept"} 3' in text
    assert 'kaisar_dropped_total{where="effect-publish"} 1' in text
    for line in text.splitlines():
        name = line.removeprefix("# HELP ").removeprefix("# TYPE ")
        assert name.startswith("kaisar_")


def test_events_are_paged(served: Any, api: httpx.Client) -> None:
    for number in range(5):
        served.node.store.add("check" if number % 2 else "lease", number=number)
    first = api.get("events?limit=2").json()
    assert ([event["data"]["number"] for event in first["events"]], first["after"]) == ([0, 1], 2)
    rest = api.get(f"events?after={first['after']}").json()
    assert [event["data"]["number"] for event in rest["events"]] == [2, 3, 4]
    assert api.get(f"events?after={rest['after']}").json() == {"events": [], "after": 5}
    only = api.get("events?kind=check").json()
    assert [event["data"]["number"] for event in only["events"]] == [1, 3]
    assert api.get("events?wait_s=31").status_code == 400


def test_a_long_poll_returns_as_soon_as_something_happens(served: Any, api: httpx.Client) -> None:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(api.get("events?wait_s=30&kind=lease").json()))
    thread.start()

    def tell() -> None:
        served.node.store.add("check")
        served.node.effects.notify()
        served.node.store.add("lease", order="x")
        served.node.effects.notify()

    served.soon(tell)
    thread.join(15)
    assert [event["kind"] for event in answers[0]["events"]] == ["lease"]


def test_registration_steps(served: Any, api: httpx.Client) -> None:
    served.node.store.add("registration", step=1, name="register", text="old")
    served.node.store.add("registration", step=1, name="register", text="new")
    answer = api.get("registration").json()
    assert (len(answer["steps"]), answer["status"]) == (10, "unregistered")
    assert (answer["steps"][0]["text"], answer["steps"][0]["done"], answer["steps"][1]["done"]) == ("new", True, False)


def test_rewards_before_anything_was_earned(api: httpx.Client) -> None:
    answer = api.get("rewards").json()
    assert (answer["earned_kai"], answer["claimed_kai"], answer["claimable_kai"]) == ("2", "2", "0")
    refused = api.get("rewards/proof")
    assert (refused.status_code, refused.json()["error"]) == (409, "nothing was earned yet")


# ── orders and leases ────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_order_is_placed(served: Any, api: httpx.Client) -> None:
    answer = api.post("orders", json=PLACE)
    assert (answer.status_code, answer.json()["order"]) == (201, ORDER.hex())
    [request] = served.node.placed
    assert request.workload.command == ("{python}", "-m", "http.server")
    assert [each.name for each in request.workload.environment] == ["A", "B"]
    assert (request.duration_s, request.max_price_planck_per_hour, request.points_planck) == (600, KAI, 0)


def test_an_order_that_nobody_can_serve(served: Any, api: httpx.Client) -> None:
    served.node.refuse_order = OrderRefused("nobody can serve this order: none has 9 GPUs", hint="ask for less")
    answer = api.post("orders", json=PLACE)
    assert (answer.status_code, answer.json()["hint"]) == (409, "ask for less")


def test_orders_are_found_by_the_beginning_of_their_id(api: httpx.Client) -> None:
    for wanted in (ORDER.hex(), ORDER.hex().upper(), "abababab"):
        answer = api.get(f"orders/{wanted}").json()
        assert answer["state"] == "RUNNING"
        assert [event["state"] for event in answer["events"]] == ["DEPLOYING", "RUNNING"]
    assert api.get(f"orders/{'00' * 32}").status_code == 404
    assert api.get("orders/ffffff").status_code == 404
    assert api.get("orders/ab").status_code == 400
    assert api.get("orders/../status").status_code == 200  # the client resolves it


def test_orders_of_this_node_and_of_everybody(served: Any, api: httpx.Client) -> None:
    assert len(api.get("orders").json()) == 1
    served.node.wallet.public_key, served.node.key = STRANGER, b"\x09" * 32
    assert api.get("orders").json() == []
    assert len(api.get("orders?all=1").json()) == 1


def test_events_of_an_order(served: Any, api: httpx.Client) -> None:
    served.node.store.add("lease", order="00", text="another")
    served.node.store.add("lease", order=ORDER.hex(), state="DEPLOYING", text="Container is deploying...")
    answer = api.get(f"orders/{ORDER.hex()}/events").json()
    assert [event["data"]["text"] for event in answer["events"]] == ["Container is deploying..."]
    assert (answer["after"], answer["state"]) == (2, "RUNNING")


def test_an_order_is_cancelled_and_its_ports_are_closed(served: Any, api: httpx.Client) -> None:
    answer = api.delete(f"orders/{ORDER.hex()}")
    assert (answer.status_code, answer.json()["call"]) == (200, (b"\xcc" * 32).hex())
    assert served.node.calls == [calls.OrderCancel(ORDER)]
    assert served.node.tunnels.closed == [ORDER]
    assert api.post(f"leases/{ORDER.hex()}/connect", json={"port": 1}).json()["error"].endswith("has ended")


def test_a_cancellation_that_the_ledger_ignores(served: Any, api: httpx.Client) -> None:
    served.node.call_reason = "not your order"
    answer = api.delete(f"orders/{ORDER.hex()}")
    assert (answer.status_code, served.node.tunnels.closed) == (409, [])
    assert "not your order" in answer.json()["error"]


def test_connecting(served: Any, api: httpx.Client) -> None:
    answer = api.post(f"leases/{ORDER.hex()}/connect", json={"port": 8080}).json()
    assert answer == {"host": "127.0.0.1", "port": 40_000}
    [lease] = api.get("leases").json()
    assert (lease["side"], lease["ports"]) == ("client", [{"port": 8080, "host": "127.0.0.1", "local_port": 40_000}])
    assert api.post(f"leases/{ORDER.hex()}/connect").json()["port"] == 40_000  # the port that its worker announced
    served.node.index.lease_events.clear()
    unknown = api.post(f"leases/{ORDER.hex()}/connect")
    assert (unknown.status_code, "names no port" in unknown.json()["error"]) == (400, True)
    taken = api.post(f"leases/{ORDER.hex()}/connect", json={"port": 8080, "local_port": 1})
    assert (taken.status_code, taken.json()["hint"]) == (502, "choose another")
    served.node.tunnels.up = (False, "nothing listens on port 9 of the container")
    assert "nothing listens" in api.post(f"leases/{ORDER.hex()}/connect", json={"port": 9}).json()["error"]


def test_logs(served: Any, api: httpx.Client) -> None:
    answer = api.get(f"leases/{ORDER.hex()}/logs?follow=1")
    assert answer.content == b"first line\nsecond line\n"
    assert served.node.tunnels.opened[0].arguments == ("follow",)
    assert served.node.tunnels.stream.closed
    served.node.tunnels.refusal = "the order has ended"
    refused = api.get(f"leases/{ORDER.hex()}/logs")
    assert (refused.status_code, refused.json()["error"]) == (502, "the worker refused: the order has ended")


def test_a_command_inside_a_lease(served: Any, api: httpx.Client) -> None:
    stream = served.node.tunnels.stream
    stream.frames = [b"\x01out", b"\x02err", b"\x030"]
    body = {"command": ["cat", "-"], "stdin": base64.b64encode(b"x" * 50_000).decode()}
    lines = api.post(f"leases/{ORDER.hex()}/exec", json=body).text.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"channel": "stdout", "data": base64.b64encode(b"out").decode()},
        {"channel": "stderr", "data": base64.b64encode(b"err").decode()},
        {"exit": 0},
    ]
    assert [len(frame) for frame in stream.sent] == [32_769, 17_233, 3]
    stream.frames = [b"\x01out"]
    [_, broken] = api.post(f"leases/{ORDER.hex()}/exec", json={"command": ["x"]}).text.splitlines()
    assert "broke" in json.loads(broken)["error"]
    assert api.post(f"leases/{ORDER.hex()}/exec", json={"command": []}).status_code == 400
    assert api.post(f"leases/{ORDER.hex()}/exec", json={"command": ["x"], "stdin": "%"}).status_code == 400


def test_a_client_that_does_not_read_cannot_keep_the_node_from_stopping(served: Any) -> None:
    served.node.tunnels.stream.endless = True
    host, port = served.address.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as idle:
        request = f"GET /v1/leases/{ORDER.hex()}/logs HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer "
        idle.sendall(f"{request}{served.address.token}\r\n\r\n".encode())
        assert idle.recv(100).startswith(b"HTTP/1.1 200")
        served.soon(served.scope.cancel)
        _eventually(lambda: not (served.directory / "api.json").exists())


# ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("transfer", {"to": ss58_encode(STRANGER), "amount_planck": "7"}, calls.Transfer(STRANGER, 7)),
        ("stake", {"action": "bond", "amount_planck": "7"}, calls.StakeBond(7)),
        ("stake", {"action": "unbond", "amount_planck": "7"}, calls.StakeUnbond(7)),
        ("stake", {"action": "withdraw"}, calls.StakeWithdraw()),
        ("licence", {"count": 2}, calls.LicenceBuy(2, bytes(32))),
        ("licence", {"referrer": ss58_encode(STRANGER)}, calls.LicenceBuy(1, STRANGER)),
        ("worker/retire", {}, calls.WorkerRetire(KEY)),
    ],
)
def test_a_call_is_signed_and_its_end_awaited(
    served: Any, api: httpx.Client, path: str, body: dict[str, object], expected: calls.CallBody
) -> None:
    answer = api.post(path, json=body)
    assert (answer.status_code, answer.json()) == (200, {"call": (b"\xcc" * 32).hex(), "block": 30})
    assert served.node.calls == [expected]
    served.node.call_reason = "the balance is too small"
    refused = api.post(path, json=body)
    assert (refused.status_code, refused.json()["call"]) == (409, (b"\xcc" * 32).hex())
    assert "the balance is too small" in refused.json()["error"]


def test_stake_needs_an_action(api: httpx.Client) -> None:
    assert api.post("stake", json={"action": "burn"}).status_code == 400


def test_rewards_are_claimed(api: httpx.Client) -> None:
    expected = {"call": (b"\xdd" * 32).hex(), "amount_kai": "3", "amount_planck": str(3 * KAI)}
    assert api.post("rewards/claim").json() == expected


def _eventually(condition: Any) -> None:
    """Another thread is at it: look until it is so, at most ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
