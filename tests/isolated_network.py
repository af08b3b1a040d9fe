"""Run a command where nothing can leave, and record what it tries to reach.

    python isolated_network.py REPORT COMMAND...

The command runs in a network namespace of its own, in which every address is this machine's: whatever is asked or
connected to arrives here. A name server answers every name with an address, so that who asks goes on to connect, and
a packet socket sees who connects where. REPORT is JSON, an object with the `names` that were asked for, the
`connections` ("tcp 192.0.2.1 443"), and the command's exit `status`.

Exits with NOT_PERMITTED where the system lets nobody make such a namespace.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

NOT_PERMITTED = 77
ANSWER = {1: ipaddress.ip_address("192.0.2.1").packed, 28: ipaddress.ip_address("2001:db8::1").packed}  # A, AAAA
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000


def enter() -> None:
    """Move this process into a namespace in which every address is local."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NET) != 0 and libc.unshare(_NEW_USER | _NEW_NET) != 0:
        raise PermissionError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if os.getuid() != user:  # in a user namespace of its own: be root there
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    with socket.socket() as control:  # lo up: SIOCGIFFLAGS, SIOCSIFFLAGS
        name, flags = struct.unpack("16sh", fcntl.ioctl(control, 0x8913, struct.pack("16sh", b"lo", 0)))
        fcntl.ioctl(control, 0x8914, struct.pack("16sh", name, flags | 1))
    for family in (socket.AF_INET, socket.AF_INET6):
        _make_everything_local(family)


def _make_everything_local(family: int) -> None:
    """`ip route add local default dev lo table local`, as a message to the kernel (rtnetlink)."""
    new_route, request_new_acknowledged, local_table, boot, host, local = 24, 0x1 | 0x4 | 0x400, 255, 3, 254, 2
    route = struct.pack("=8BI", family, 0, 0, 0, local_table, boot, host, local, 0)
    route += struct.pack("=HHI", 8, 4, socket.if_nametoindex("lo"))  # the attribute "outgoing interface"
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(struct.pack("=IHHII", 16 + len(route), new_route, request_new_acknowledged, 1, 0) + route)
        error = struct.unpack_from("=i", kernel.recv(4096), 16)[0]
    if error and family == socket.AF_INET:  # a kernel without IPv6 has nothing to lead here
        raise PermissionError(-error, os.strerror(-error))


class Recorder:
    """What was asked for and connected to since it was made."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.connections: list[str] = []
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.ntohs(3))  # of every protocol
        threading.Thread(target=self._watch, args=(packets,), daemon=True).start()
        for family, everyone in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            try:
                server = socket.socket(family, socket.SOCK_DGRAM)
                if family == socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                else:  # the answer must come from the address that was asked, whichever that is: IP_PKTINFO
                    server.setsockopt(socket.IPPROTO_IP, 8, 1)
                server.bind((everyone, 53))
            except OSError:
                if family == socket.AF_INET:
                    raise
                continue
            threading.Thread(target=self._answer, args=(server,), daemon=True).start()

    def _answer(self, server: socket.socket) -> None:
        while True:  # bounded: a daemon's thread ends with the process
            question, info, _, asker = server.recvmsg(4096, 256)
            name, end = _read_name(question)
            self.names.append(name)
            kind = struct.unpack_from(">H", question, end)[0]
            found = ANSWER.get(kind)
            reply = question[:2] + struct.pack(">5H", 0x8180, 1, int(found is not None), 0, 0) + question[12 : end + 4]
            if found is not None:
                reply += struct.pack(">HHHIH", 0xC00C, kind, 1, 60, len(found)) + found
            ours = [item for item in info if item[:2] == (socket.IPPROTO_IP, 8)]
            server.sendmsg([reply], ours, 0, asker)

    def _watch(self, packets: socket.socket) -> None:
        while True:  # bounded: as above
            data, (_, _, kind, *_) = packets.recvfrom(65536)
            if kind == socket.PACKET_OUTGOING and (found := _describe(data)) is not None:
                self.connections.append(found)


def _read_name(message: bytes) -> tuple[str, int]:
    """Return the name that a DNS message asks for, and where it ends."""
    labels, place = [], 12
    while message[place]:
        labels.append(message[place + 1 : place + 1 + message[place]].decode("ascii", "replace"))
        place += 1 + message[place]
    return ".".join(labels), place + 1


def _describe(packet: bytes) -> str | None:
    """Say where a packet goes that begins something; None for one that answers, or belongs to what was begun."""
    if packet[0] >> 4 == 4:
        protocol, target, rest = packet[9], packet[16:20], packet[(packet[0] & 15) * 4 :]
    else:
        protocol, target, rest = packet[6], packet[24:40], packet[40:]
    address = str(ipaddress.ip_address(target))
    if protocol == 6:
        begins = rest[13] & 0x12 == 0x02  # SYN without ACK
        return f"tcp {address} {struct.unpack_from('>H', rest, 2)[0]}" if begins else None
    if protocol == 17:
        source, port = struct.unpack_from(">HH", rest)
        return None if 53 in (source, port) else f"udp {address} {port}"  # names are counted by the name server
    return None if protocol in (1, 58) else f"protocol {protocol} {address}"  # ICMP says what was not there


def main() -> None:
    """See the module."""
    report, command = Path(sys.argv[1]), sys.argv[2:]
    try:
        enter()
        recorder = Recorder()
    except OSError as error:
        sys.stderr.write(f"no network namespace can be made here: {error}\n")
        sys.exit(NOT_PERMITTED)
    status = subprocess.run(command, check=False, timeout=160).returncode
    time.sleep(0.2)  # for packets that are under way
    report.write_text(
        json.dumps({"names": recorder.names, "connections": recorder.connections, "status": status}), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
