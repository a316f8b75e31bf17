"""A slow line between two namespaces, for kernels without netem: two TUN devices with this process between them.

`line_process.py <inner namespace> <outer namespace> <outer interface> <one-way delay in seconds> <loss, 0 to 1>`.
Every TCP connection that is begun over it from inside is told on stdout: `<monotonic seconds> <from> <to>`.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
import sys
import time
from collections import deque

from tests.netns.namespaces import enter

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MOST = 5000  # packets on the way
_SYN, _ACK, _TCP = 0x02, 0x10, 6


def tun(namespace: str, name: str) -> int:
    """A new TUN device; its packets are read from and written to the descriptor."""
    enter(namespace)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def tell(packet: bytes) -> None:
    """Whether a connection begins here, and with whom."""
    head = (packet[0] & 15) * 4
    if packet[0] >> 4 == 4 and packet[9] == _TCP and packet[head + 13] & (_SYN | _ACK) == _SYN:
        source, target = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
        print(time.monotonic(), source, target, flush=True)


def carry(inner: int, outer: int, delay_s: float, loss: float) -> None:
    """Carry packets both ways, for ever."""
    other, on_the_way = {inner: outer, outer: inner}, deque[tuple[float, int, bytes]]()
    chance = random.Random(1)
    while True:
        wait_s = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for fd in select.select([inner, outer], [], [], wait_s)[0]:
            packet = os.read(fd, 65536)
            if fd == inner:
                tell(packet)
            if chance.random() >= loss and len(on_the_way) < _MOST:
                on_the_way.append((time.monotonic() + delay_s, other[fd], packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, fd, packet = on_the_way.popleft()
            try:
                os.write(fd, packet)
            except OSError:
                continue  # the interface is down: a packet is lost


def main(inner: str, outer: str, interface: str, delay_s: str, loss: str) -> None:
    """Make the devices, say so, and carry."""
    ends = tun(inner, "up0"), tun(outer, interface)
    print("ready", flush=True)
    carry(*ends, float(delay_s), float(loss))


if __name__ == "__main__":
    main(*sys.argv[1:])
