# SPDX-License-Identifier: Apache-2.0
"""Nodes in network namespaces of their own, with a router between them, so that a test can cut one of them off."""

import ctypes
import functools
import os
import shutil
import subprocess
import uuid
from typing import Self

_CLONE_NEWNET = 0x40000000


@functools.cache
def why_not() -> str:
    """Why this machine has no namespaces to give; empty if it has."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces take root and iproute2"
    name = f"rf{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        _ip("netns", "del", name)
    return made.stderr.strip()


class Network:
    """`nodes` namespaces; node i has the address 10.77.i.2. One more namespace routes between them."""

    def __init__(self, nodes: int) -> None:
        self._mark = f"rf{uuid.uuid4().hex[:6]}"
        self._nodes = nodes

    def __enter__(self) -> Self:
        hub = self._name("hub")
        try:
            for name in self._names():
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("netns", "exec", hub, "sysctl", "-qw", "net.ipv4.ip_forward=1")
            for node in range(self._nodes):
                self._connect(node, hub)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self, node: int, hub: str) -> None:
        name = self._name(node)
        _ip("-n", hub, "link", "add", f"v{node}", "type", "veth", "peer", "name", "eth", "netns", name)
        _ip("-n", hub, "address", "add", f"10.77.{node}.1/24", "dev", f"v{node}")
        _ip("-n", hub, "link", "set", f"v{node}", "up")
        _ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", "eth")
        _ip("-n", name, "link", "set", "eth", "up")
        _ip("-n", name, "route", "add", "default", "via", f"10.77.{node}.1")

    def __exit__(self, *_: object) -> None:
        for name in self._names():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def address(self, node: int) -> str:
        return f"10.77.{node}.2"

    def enter(self, node: int) -> None:
        """Move this process, and all that it starts, to the node's namespace."""
        fd = os.open(f"/var/run/netns/{self._name(node)}", os.O_RDONLY | os.O_CLOEXEC)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(fd)

    def cut(self, node: int) -> None:
        """This node is alone: what it sends and what is sent to it vanishes, and nothing refuses."""
        _ip("-n", self._name("hub"), "rule", "add", "pref", "10", "iif", f"v{node}", "blackhole")
        _ip("-n", self._name("hub"), "rule", "add", "pref", "10", "to", self.address(node), "blackhole")

    def mend(self, node: int) -> None:
        """The opposite."""
        _ip("-n", self._name("hub"), "rule", "del", "pref", "10", "iif", f"v{node}", "blackhole")
        _ip("-n", self._name("hub"), "rule", "del", "pref", "10", "to", self.address(node), "blackhole")

    def _name(self, of: int | str) -> str:
        return f"{self._mark}-{of}"

    def _names(self) -> list[str]:
        return [self._name("hub"), *(self._name(node) for node in range(self._nodes))]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
