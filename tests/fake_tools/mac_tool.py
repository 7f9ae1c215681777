"""What every program of a fake Mac runs: `mac_tool.py FOLDER TOOL ARGUMENTS...`. Standard library only.

The forms of the answers are those of published captures (macOS 15 to 27); the content comes from FOLDER/state.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

State = dict[str, Any]


# -- answers -------------------------------------------------------------------------------------------
def thunderbolt(state: State) -> str:
    buses = []
    for number, port in enumerate(state["ports"]):
        bus: State = {
            "_name": f"thunderboltusb4_bus_{number}",
            "device_name_key": state["product"],
            "domain_uuid_key": port["domain"],
            "receptacle_1_tag": {
                "current_speed_key": port["speed"] if port["items"] else port["idle_speed"],
                "link_status_key": "0x2" if port["items"] else "0x100",
                "micro_version_key": "0.0.0",
                "receptacle_id_key": port["receptacle"],
                "receptacle_status_key": "receptacle_connected" if port["items"] else "receptacle_no_devices_connected",
            },
            "route_string_key": "0",
            "switch_uid_key": f"0x05AC{number:012X}",
            "vendor_name_key": "Apple Inc.",
        }
        if port["items"]:
            bus["_items"] = port["items"]
        buses.append(bus)
    # A host controller without a network of its own, as there is with some monitors plugged in.
    buses.append({"_name": "thunderboltusb4_bus_9", "device_name_key": state["product"], "vendor_name_key": "Apple"})
    return json.dumps({"SPThunderboltDataType": buses}, indent=2)


def hardware(state: State) -> str:
    entry = {
        "_name": "hardware_overview",
        "chip_type": state["chip"],
        "machine_model": state["model"],
        "machine_name": state["product"],
        "number_processors": "proc 14:10:4",
        "physical_memory": f"{state['memory_gb']} GB",
        "serial_number": "XXXXXXXXXX",
    }
    return json.dumps({"SPHardwareDataType": [entry]}, indent=2)


def hardware_ports(state: State) -> str:
    rows = [(one["port"], one["name"]) for one in state["lan"] if one["port"]]
    rows += [(f"Thunderbolt {port['receptacle']}", port["interface"]) for port in state["ports"]]
    rows.append(("Thunderbolt Bridge", "bridge0"))
    blocks = [
        f"\nHardware Port: {name}\nDevice: {device}\nEthernet Address: 36:00:00:00:00:01\n" for name, device in rows
    ]
    return "".join(blocks) + "\nVLAN Configurations\n===================\n"


def ifconfig(state: State) -> str:
    parts = ["lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384\n\tinet 127.0.0.1 netmask 0xff000000\n"]
    parts += [_block(one) for one in state["lan"]]
    for port in state["ports"]:
        addresses = state["addresses"].get(port["interface"], [])
        active = "active" if port["items"] else "inactive"
        inet = "".join(_inet(text) for text in addresses)
        head = f"{port['interface']}: flags=8963<UP,BROADCAST,SMART,RUNNING,PROMISC,SIMPLEX,MULTICAST> mtu 1500\n"
        parts.append(
            f"{head}\toptions=460<TSO4,TSO6,CHANNEL_IO>\n{inet}\tmedia: autoselect <full-duplex>\n\tstatus: {active}\n"
        )
    flags = "8863<UP,BROADCAST,SMART,RUNNING" if state["bridge_up"] else "8822<BROADCAST,SMART"
    members = "".join(
        f"\tmember: {name} flags=3<LEARNING,DISCOVER>\n\t        ifmaxaddr 0 port 10 priority 0 path cost 0\n"
        for name in state["bridge_members"]
    )
    parts.append(
        f"bridge0: flags={flags},SIMPLEX,MULTICAST> mtu 1500\n\tConfiguration:\n\t\tid 0:0:0:0:0:0 priority 0\n"
        f"{members}\tmedia: <unknown type>\n\tstatus: inactive\n"
    )
    return "".join(parts)


def _block(one: State) -> str:
    flags = "8051<UP,POINTOPOINT,RUNNING,MULTICAST>" if one["name"].startswith("utun") else "8863<UP,BROADCAST,RUNNING>"
    inet = "".join(_inet(text) for text in one["addresses"])
    media = f"\tmedia: autoselect ({one['media']} <full-duplex>)\n" if one["media"] else ""
    status = "" if one["name"].startswith("utun") else f"\tstatus: {'active' if one['addresses'] else 'inactive'}\n"
    return f"{one['name']}: flags={flags} mtu 1500\n\tether 36:00:00:00:00:01\n{inet}{media}{status}"


def _inet(text: str) -> str:
    address = IPv4Interface(text)
    return f"\tinet {address.ip} netmask {int(address.netmask):#010x} broadcast {address.network.broadcast_address}\n"


def netstat(state: State) -> str:
    lines = [
        "Routing tables",
        "",
        "Internet:",
        "Destination        Gateway            Flags               Netif Expire",
    ]
    for one in state["lan"]:
        for text in one["addresses"]:
            network = IPv4Interface(text).network
            if one["gateway"]:
                lines.append(f"default            {one['gateway']:<18} UGScg               {one['name']}")
            lines.append(f"{_short(network):<18} link#6             UCS                 {one['name']}      !")
            lines.append(f"{network[-1]!s:<18} 0:11:22:33:44:55   UHLWIir             {one['name']}   1195")
    lines.append("127                127.0.0.1          UCS                 lo0")
    own = [(IPv4Interface(text).network, name) for name, texts in state["addresses"].items() for text in texts]
    lines += [f"{_short(network):<18} link#12            UCS                 {name}      !" for network, name in own]
    lines += [f"{target:<18} link#20            UCS                 {name}" for target, name in state["routes"]]
    return "\n".join(lines) + "\n"


def _short(network: IPv4Network) -> str:
    """As netstat shortens: 192.168.1.0/24 is 192.168.1, 10.0.0.0/30 is 10/30."""
    parts = str(network.network_address).split(".")
    whole = network.prefixlen // 8
    if network.prefixlen % 8 == 0 and 0 < whole < 4:
        return ".".join(parts[:whole])
    while len(parts) > 1 and parts[-1] == "0":
        parts.pop()
    return f"{'.'.join(parts)}/{network.prefixlen}"


def ibv_devices(state: State) -> str:
    rows = "".join(f"    {name:<16}\t8096a9d9edba{number:04x}\n" for number, name in enumerate(state["rdma_devices"]))
    return f"    device          \t   node GUID\n    ------          \t----------------\n{rows}"


def ibv_devinfo(state: State) -> str:
    blocks = []
    cabled = {port["interface"] for port in state["ports"] if port["items"]}
    for name in state["rdma_devices"]:
        active = name.removeprefix("rdma_") in cabled and name not in state["rdma_down"]
        word = "PORT_ACTIVE (4)" if active else "PORT_DOWN (1)"
        blocks.append(
            f"hca_id:\t{name}\n\ttransport:\t\t\tThunderbolt (100)\n\tphys_port_cnt:\t\t\t1\n\t\tport:\t1\n"
            f"\t\t\tstate:\t\t\t{word}\n\t\t\tmax_mtu:\t\t4096 (5)\n\t\t\tlink_layer:\t\tThunderbolt\n"
        )
    return "\n".join(blocks)


def pmset(state: State, arguments: list[str]) -> str:
    if "batt" in arguments:
        return "Now drawing from 'AC Power'\n"
    if "therm" in arguments:
        return (
            "Note: No thermal warning level has been recorded\nNote: No performance warning level has been recorded\n"
        )
    return (
        "System-wide power settings:\nCurrently in use:\n standby              0\n Sleep On Power Button 1\n"
        " disksleep            10\n sleep                1 (sleep prevented by sharingd, caffeinate)\n"
        " displaysleep         10\n womp                 1\n"
    )


def sysctl(state: State) -> str:
    return (
        f"hw.memsize: {state['memory_gb'] << 30}\n"
        "kern.boottime: { sec = 1732000000, usec = 0 } Tue Nov 19 07:06:40 2024\n"
        f"iogpu.wired_limit_mb: 0\nmachdep.cpu.brand_string: {state['chip']}\n"
    )


def vm_stat(state: State) -> str:
    return (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               100000.\n"
        "Pages active:                             200000.\nPages inactive:                           150000.\n"
        "Pages speculative:                          1000.\nPages wired down:                          90000.\n"
        "Pages occupied by compressor:              20000.\n"
    )


# -- changes -------------------------------------------------------------------------------------------
def change_interface(folder: Path, state: State, arguments: list[str]) -> int:
    """`ifconfig bridge0 down`, `ifconfig en2 inet A netmask M [alias]`."""
    name, *rest = arguments
    if rest == ["down"] and name == "bridge0":
        state["bridge_up"] = False
    elif rest[:1] == ["inet"] and any(port["interface"] == name for port in state["ports"]):
        address = str(IPv4Interface(f"{rest[1]}/{rest[3]}"))
        own = state["addresses"].setdefault(name, [])
        own[:] = [*own, address] if rest[-1] == "alias" else [address]
    else:
        print(f"ifconfig: {' '.join(arguments)}: not understood by the fake", file=sys.stderr)
        return 1
    save(folder, state)
    return 0


def sudo(folder: Path, arguments: list[str]) -> int:
    """Runs what only touches the fake machine; everything else is written down and not done."""
    while arguments and arguments[0].startswith("-"):
        arguments = arguments[1:]
    with (folder / "sudo.log").open("a") as log:
        log.write(json.dumps(arguments) + "\n")
    if arguments[0] in ("ifconfig", "route", "networksetup"):
        return run(folder, arguments[0], arguments[1:])
    if arguments[0] in ("ls", "true"):
        return subprocess.run([shutil.which(arguments[0]) or arguments[0]], check=False).returncode
    return 0


CALLS = (
    "system_profiler SPThunderboltDataType -json",
    "system_profiler SPHardwareDataType -json",
    "networksetup -listallhardwareports",
    "ifconfig -a",
    "netstat -rn -f inet",
    "ibv_devices",
    "ibv_devinfo",
    "rdma_ctl status",
    "pmset -g",
    "pmset -g batt",
    "pmset -g therm",
    "sw_vers",
    "ipconfig getifaddr en0",
    "ipconfig getifaddr en1",
    "uname -s",
    "uname -srm",
)
"""Calls whose answers lie ready as files: printing one takes a fiftieth of starting Python."""


def save(folder: Path, state: State) -> None:
    new = folder / "state.json.new"
    new.write_text(json.dumps(state))
    new.replace(folder / "state.json")
    ready = folder / "answers"
    ready.mkdir(exist_ok=True)
    for call in CALLS:
        tool, *arguments = call.split()
        (ready / call).write_text(answer(state, tool, arguments) or "")


def answer(state: State, tool: str, arguments: list[str]) -> str | None:
    """Standard output of a call that only asks; None: the fake does not know it."""
    asked = " ".join(arguments)
    if tool == "uname":
        return "Darwin 25.2.0 arm64\n" if asked == "-srm" else "arm64\n" if asked == "-m" else "Darwin\n"
    if tool == "ipconfig":
        first: list[str] = next((one["addresses"] for one in state["lan"] if one["name"] == arguments[-1]), [])
        return "".join(f"{IPv4Interface(text).ip}\n" for text in first[:1])
    if tool == "pmset":
        return pmset(state, arguments)
    if tool == "sw_vers":
        return f"ProductName:\t\tmacOS\nProductVersion:\t\t{state['macos']}\nBuildVersion:\t\t{state['build']}\n"
    if tool == "rdma_ctl":
        return f"{state['rdma_switch']}\n"
    plain = {
        "system_profiler": hardware if "SPHardwareDataType" in arguments else thunderbolt,
        "networksetup": hardware_ports,
        "ifconfig": ifconfig,
        "netstat": netstat,
        "ibv_devices": ibv_devices,
        "ibv_devinfo": ibv_devinfo,
        "sysctl": sysctl,
        "vm_stat": vm_stat,
    }
    return plain[tool](state) if tool in plain else None


def run(folder: Path, tool: str, arguments: list[str]) -> int:
    state: State = json.loads((folder / "state.json").read_text())
    if tool == "sudo":
        return sudo(folder, arguments)
    if tool == "route" or (tool == "networksetup" and arguments != ["-listallhardwareports"]):
        return 0
    if tool == "ifconfig" and len(arguments) > 1:
        return change_interface(folder, state, arguments)
    text = answer(state, tool, arguments)
    if text is None:
        print(f"{tool}: not part of this fake", file=sys.stderr)
        return 127
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
