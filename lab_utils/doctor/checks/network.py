"""What ranks need to find one another, as far as it can be seen without a job: interface, name, ports, peers."""

from __future__ import annotations

import contextlib
import socket

from lab_utils.doctor._machine import Machine, Row

ORDER = 30
BASE_PORT, PORTS = 60000, 16  # HCCL's bootstrap listens from HCCL_IF_BASE_PORT on, one port a rank
PEER_PORT = 22
SECONDS = 3.0


def check(machine: Machine) -> list[Row]:
    return [_interface(machine), _name(), _ports(machine), *(_peer(peer) for peer in machine.peers)]


def interfaces() -> dict[str, str]:
    """Interfaces that are up, without loopback, each with an address; those of containers too."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup and name != "lo"}
    families = (socket.AF_INET, socket.AF_INET6)
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        own = [a.address for a in addresses if a.family in families]
        if name in up and own:
            found[name] = own[0]
    return found


def chosen(setting: str, names: list[str]) -> list[str]:
    """Interfaces that HCCL_SOCKET_IFNAME leaves: ``eth,ib`` begin a name, ``=eth0`` is one, ``^docker`` are others."""
    exclude, exact = setting.startswith("^"), setting.lstrip("^").startswith("=")
    given = [part.strip() for part in setting.lstrip("^=").split(",") if part.strip()]

    def fits(name: str) -> bool:
        return name in given if exact else name.startswith(tuple(given))

    return [name for name in names if fits(name) != exclude]


def _interface(machine: Machine) -> Row:
    found = interfaces()
    shown = ", ".join(f"{name} {address}" for name, address in found.items()) or "none"
    setting = machine.environ.get("HCCL_SOCKET_IFNAME")
    if not found:
        advice = "Jobs of one node work over loopback; for more, an interface with an address must be up."
        return Row("network interface", None, "none is up but loopback", advice)
    if not setting:
        advice = ""
        if len(found) > 1:
            advice = (
                "Several: name the one that all nodes share in HCCL_SOCKET_IFNAME (and GLOO_SOCKET_IFNAME)."
            )
        return Row("network interface", True, f"{shown}; HCCL_SOCKET_IFNAME is not set", advice)
    left = chosen(setting, list(found))
    if not left:
        advice = f"HCCL_SOCKET_IFNAME={setting} names no interface that is up here: choose from {', '.join(found)}."
        return Row("network interface", False, shown, advice)
    return Row("network interface", True, f"{', '.join(left)} by HCCL_SOCKET_IFNAME={setting}")


def _name() -> Row:
    """A host name that resolves to loopback sends the other nodes to themselves."""
    name = socket.gethostname()
    try:
        addresses = sorted({info[4][0] for info in socket.getaddrinfo(name, None)})
    except OSError as error:
        advice = "Other nodes cannot be told where rank 0 is: add the name to DNS or /etc/hosts."
        return Row("host name", False, f"{name} does not resolve ({error})", advice)
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        if not interfaces():
            return Row(
                "host name", None, f"{name} is {', '.join(addresses)}, and there is no other interface"
            )
        advice = (
            "Jobs of several nodes need another address first in /etc/hosts; on one node this does no harm."
        )
        return Row("host name", None, f"{name} is {', '.join(addresses)} alone", advice)
    return Row("host name", True, f"{name} is {', '.join(addresses)}")


def _ports(machine: Machine) -> Row:
    setting = machine.environ.get("HCCL_HOST_SOCKET_PORT_RANGE")
    if setting == "auto":
        return Row("ports of HCCL", True, "HCCL_HOST_SOCKET_PORT_RANGE=auto: free ones are found")
    try:
        first, last = _range(setting, machine.environ.get("HCCL_IF_BASE_PORT"))
    except ValueError:
        value = setting or machine.environ.get("HCCL_IF_BASE_PORT")
        return Row(
            "ports of HCCL",
            False,
            f"'{value}' is no range of ports",
            "Write FIRST-LAST, as 60000-60050, or auto.",
        )
    taken = [port for port in range(first, last + 1) if not _free(port)]
    if taken:
        advice = f"Free them, or move the range by HCCL_IF_BASE_PORT on all nodes (now {first})."
        return Row("ports of HCCL", False, f"{first}-{last}, taken: {', '.join(map(str, taken[:8]))}", advice)
    return Row("ports of HCCL", True, f"{first}-{last} are free")


def _range(setting: str | None, base: str | None) -> tuple[int, int]:
    if setting:
        first, _, last = setting.split(",")[0].partition("-")
        low, high = int(first), int(last or first)
    else:
        low = int(base) if base else BASE_PORT
        high = low + PORTS - 1
    if not 0 < low <= high < 65536 or high - low > 4096:
        raise ValueError(setting)
    return low, high


def _free(port: int) -> bool:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True


def _peer(peer: str) -> Row:
    host, _, port = peer.partition(":")
    number = int(port) if port.isdigit() else PEER_PORT
    try:
        with socket.create_connection((host, number), timeout=SECONDS):
            return Row(f"peer {host}", True, f"port {number} answers")
    except ConnectionRefusedError:
        # The machine is there and has said so itself: a port of choice may have nobody listening.
        advice = (
            "" if not port else f"Nothing listens on port {number} of {host}: start it, or name another port."
        )
        return Row(f"peer {host}", not port, f"reachable, port {number} is closed", advice)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error))
        advice = "Same subnet and interface on both? A firewall between nodes must let HCCL's ports through."
        return Row(f"peer {host}", False, f"port {number}: {reason}", advice)
