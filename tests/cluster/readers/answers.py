"""Answers of system tools in their real forms: published captures, with identifiers replaced, and fakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jupiter_engine.cluster.readers import apple, linux, network, nvidia, thunderbolt
from tests.fake_tools.linux_box import FakeLinux
from tests.fake_tools.macs import ring

IFCONFIG = """lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\toptions=1203<RXCSUM,TXCSUM,TXSTATUS,SW_TIMESTAMP>
\tinet 127.0.0.1 netmask 0xff000000
\tinet6 ::1 prefixlen 128
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 60:3e:5f:88:0c:1a
\tinet6 fe80::c3f:8342:b210:f73b%en0 prefixlen 64 secured scopeid 0xf
\tinet 192.168.1.237 netmask 0xffffff00 broadcast 192.168.1.255
\tmedia: autoselect (10Gbase-T <full-duplex,flow-control>)
\tstatus: active
en2: flags=8963<UP,BROADCAST,SMART,RUNNING,PROMISC,SIMPLEX,MULTICAST> mtu 1500
\tmedia: autoselect <full-duplex>
\tstatus: inactive
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tConfiguration:
\t\tid 0:0:0:0:0:0 priority 0 hellotime 0 fwddelay 0
\tmember: en2 flags=3<LEARNING,DISCOVER>
\t        ifmaxaddr 0 port 10 priority 0 path cost 0
\tmember: en3 flags=3<LEARNING,DISCOVER>
\tstatus: inactive
utun4: flags=8051<UP,POINTOPOINT,RUNNING,MULTICAST> mtu 1280
\tinet 100.101.102.103 --> 100.101.102.103 netmask 0xffffffff
bridge100: flags=8a63<UP,BROADCAST,SMART,RUNNING> mtu 1500
\tinet 192.168.64.1 netmask 0xffffff00 broadcast 192.168.64.255
"""

NETSTAT = """Routing tables

Internet:
Destination        Gateway            Flags               Netif Expire
default            192.168.1.1        UGScg                 en0
10/8               utun4              USc                 utun4
10.0.0/30          link#12            UCS                   en2      !
127                127.0.0.1          UCS                   lo0
169.254            link#15            UCS                   en0      !
192.168.1          link#15            UCS                   en0      !
192.168.1.1/32     link#15            UCS                   en0      !
192.168.1.1        a:b:c:d:e:f        UHLWIir               en0   1195
224.0.0/4          link#15            UmCS                  en0      !
255.255.255.255/32 link#15            UCS                   en0      !
"""

HARDWARE = """{"SPHardwareDataType": [{"_name": "hardware_overview", "chip_type": "Apple M3 Ultra",
"machine_model": "Mac15,14", "machine_name": "Mac Studio", "number_processors": "proc 32:24:8",
"physical_memory": "512 GB"}]}"""

IBV_DEVICES = """    device          \t   node GUID
    ------          \t----------------
    rdma_en2        \t8096a9d9edbaac05
    rdma_en3        \t8196a9d9edbaac05
"""

IBV_DEVINFO = """hca_id:\trdma_en2
\ttransport:\t\t\tThunderbolt (100)
\tphys_port_cnt:\t\t\t1
\t\tport:\t1
\t\t\tstate:\t\t\tPORT_ACTIVE (4)
\t\t\tmax_mtu:\t\t4096 (5)
\t\t\tlink_layer:\t\tThunderbolt

hca_id:\trdma_en3
\t\tport:\t1
\t\t\tstate:\t\t\tPORT_DOWN (1)
"""

PMSET = """System-wide power settings:
Currently in use:
 standby              0
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 disksleep            10
 sleep                1 (sleep prevented by powerd, sharingd)
 autorestart          0
"""

BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=1234)\t95%; discharging; 4:12 remaining present: true
"""

THERMAL_LIMITED = """Note: No thermal warning level has been recorded
2026-11-20 10:00:00 +0100 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= 62
"""

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               13312.
Pages active:                            500000.
Pages inactive:                          490000.
Pages speculative:                         5000.
Pages wired down:                        200000.
"Translation faults":                 123456789.
Pages occupied by compressor:            100000.
"""

SYSCTL = """hw.memsize: 17179869184
kern.boottime: { sec = 1732000000, usec = 123456 } Tue Nov 19 07:06:40 2024
iogpu.wired_limit_mb: 12288
machdep.cpu.brand_string: Apple M4
"""

SW_VERS = "ProductName:\t\tmacOS\nProductVersion:\t\t26.2\nBuildVersion:\t\t25C56\n"

FIREWALL = "Firewall is enabled. (State = 1)\n"

NVIDIA = """0, GPU-5d1d, NVIDIA GeForce RTX 4090, 24564, 1234, 97, 71, 412.35, 450.00, 580.95.05, [N/A]
1, GPU-77aa, NVIDIA H100 80GB HBM3, 81559, 0, [N/A], 30, [Not Supported], 700.00, 580.95.05, Enabled
"""

P2P = """ \t\x1b[4mGPU0\tGPU1\tGPU2\x1b[0m
GPU0\tX\tCNS\tOK
GPU1\tCNS\tX\tGNS
GPU2\tOK\tGNS\tX

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
  GNS  = GPU not supported
"""

KERNEL_LOG = """2026-11-20T10:00:00+01:00 box kernel: usb 1-1: new device
2026-11-20T10:00:01+01:00 box kernel: NVRM: Xid (PCI:0000:01:00): 79, pid=1234, GPU has fallen off the bus.
[ 1234.5] NVRM: Xid (PCI:0000:02:00): 13, Graphics Exception
"""

CPUINFO = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n"
MEMINFO = "MemTotal:       24689436 kB\nMemFree:         1000000 kB\nMemAvailable:   18123456 kB\n"
STAT = "cpu  100 5 50 800 45 0 3 2 0 0\ncpu0 50 2 25 400 22 0 1 1 0 0\nintr 12\n"

_MAC = ring(3)[0].raw()
_BOX = FakeLinux("box", 1).raw()

REAL: Mapping[str, tuple[Callable[[object], object], str]] = {
    "thunderbolt_ports": (thunderbolt.thunderbolt_ports, _MAC["thunderbolt"]),
    "hardware_ports": (thunderbolt.hardware_ports, _MAC["hardware_ports"]),
    "rdma_devices": (thunderbolt.rdma_devices, IBV_DEVICES),
    "rdma_ports": (thunderbolt.rdma_ports, IBV_DEVINFO),
    "rdma_state": (thunderbolt.rdma_state, "enabled\n"),
    "mac_interfaces": (network.mac_interfaces, IFCONFIG),
    "mac_routes": (network.mac_routes, NETSTAT),
    "linux_interfaces": (network.linux_interfaces, _BOX["ip_addr"]),
    "linux_routes": (network.linux_routes, _BOX["ip_route"]),
    "net_speeds": (network.net_speeds, _BOX["net_speeds"]),
    "mac_hardware": (apple.mac_hardware, HARDWARE),
    "mac_system": (apple.mac_system, SW_VERS),
    "sysctl": (apple.sysctl, SYSCTL),
    "sleep_settings": (apple.sleep_settings, PMSET),
    "battery": (apple.battery, BATTERY),
    "thermal": (apple.thermal, THERMAL_LIMITED),
    "memory_use": (apple.memory_use, VM_STAT),
    "firewall": (apple.firewall, FIREWALL),
    "cards": (nvidia.cards, NVIDIA),
    "peer_access": (nvidia.peer_access, P2P),
    "xids": (nvidia.xids, KERNEL_LOG),
    "memory": (linux.memory, MEMINFO),
    "processor": (linux.processor, CPUINFO),
    "load": (linux.load, "0.52 0.48 0.40 1/300 12345\n"),
    "times": (linux.times, STAT),
    "uptime_s": (linux.uptime_s, "12345.67 54321.00\n"),
    "linger": (linux.linger, _BOX["linger"]),
    "clock": (linux.clock, _BOX["timedatectl"]),
}
"""Every reader with a real answer."""
