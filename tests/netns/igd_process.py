"""A router's UPnP: answers to searches on its inner network, and forwards ports by iptables when it is asked to.

Started inside the router's namespace: `igd_process.py <inner address> <outer address> <iptables>`.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from functools import partial

import trio

GROUP, SSDP_PORT, HTTP_PORT = "239.255.255.250", 1900, 5000
SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"


async def ssdp(inner: str) -> None:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        await udp.bind(("", SSDP_PORT))
        membership = socket.inet_aton(GROUP) + socket.inet_aton(inner)
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        print("ready", flush=True)
        answer = f"HTTP/1.1 200 OK\r\nST: x\r\nLOCATION: http://{inner}:{HTTP_PORT}/desc.xml\r\n\r\n".encode()
        while True:
            _, sender = await udp.recvfrom(2048)
            await udp.sendto(answer, sender)


async def soap(outer: str, iptables: str, stream: trio.SocketStream) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        request += await stream.receive_some()
    head, _, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += await stream.receive_some()
    text = answer(outer, iptables, head.decode(), body.decode())
    await stream.send_all(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
    await stream.aclose()


def answer(outer: str, iptables: str, head: str, body: str) -> str:
    if head.startswith("GET"):
        return f"<service><serviceType>{SERVICE}</serviceType><controlURL>/c</controlURL></service>"
    if "#GetExternalIPAddress" in head:
        return f"<NewExternalIPAddress>{outer}</NewExternalIPAddress>"
    fields = dict(re.findall(r"<(New\w+)>([^<]*)</", body))
    add = "#AddPortMapping" in head
    target = f"{fields.get('NewInternalClient')}:{fields.get('NewInternalPort')}"
    match = ("-i", "up0", "-p", "tcp", "--dport", fields["NewExternalPort"])
    if add:
        rules = (
            ("-t", "nat", "-I", "PREROUTING", *match, "-j", "DNAT", "--to-destination", target),
            ("-I", "FORWARD", "-i", "up0", "-p", "tcp", "--dport", fields["NewInternalPort"], "-j", "ACCEPT"),
        )
    else:
        rules = (("-t", "nat", "-F", "PREROUTING"),)
    for rule in rules:
        subprocess.run((iptables, *rule), check=True)
    return ""


async def main(inner: str, outer: str, iptables: str) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_tcp, partial(soap, outer, iptables), HTTP_PORT, host=inner))
        nursery.start_soon(ssdp, inner)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
