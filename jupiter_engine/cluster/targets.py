"""Which packages a node needs, and for which Python and system they must be built."""

from __future__ import annotations

import hashlib
import re
from importlib import metadata
from typing import Any, Final, Literal

import msgspec

from jupiter_engine.errors import StageFailed

Kind = Literal["mac", "nvidia", "cpu"]

CONSOLE_ONLY: Final = frozenset({"asyncssh", "textual", "zeroconf"})
"""Packages of the control wing: a node calls no other machines and draws nothing."""
NOT_ON: Final[dict[Kind, frozenset[str]]] = {"mac": frozenset({"torch"}), "nvidia": frozenset(), "cpu": frozenset()}
"""A Mac needs torch only to read the file that carries the embedded base model, which is done where the console is."""
IMPORTS: Final[dict[Kind, tuple[str, ...]]] = {
    "mac": ("msgspec", "psutil", "yaml", "numpy", "tokenizers", "safetensors", "mlx.core", "mlx_lm"),
    "nvidia": ("msgspec", "psutil", "yaml", "numpy", "tokenizers", "safetensors", "torch"),
    "cpu": ("msgspec", "psutil", "yaml", "numpy", "tokenizers", "safetensors", "torch"),
}
"""What must load in a finished environment."""
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*([^;]*)(?:;\s*(.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A Python on a machine, as far as packages care."""

    system: Literal["Linux", "Darwin"]
    machine: Literal["x86_64", "aarch64", "arm64"]
    python: str
    """3.12.4"""
    platform: tuple[int, int]
    """macOS release, or version of glibc."""

    def tags(self) -> tuple[str, ...]:
        """Platform tags of wheels that run there, best first."""
        major, minor = self.platform
        if self.system == "Darwin":
            # pip adds the older releases by itself.
            return (f"macosx_{major}_0_{self.machine}",)
        named = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
        tags: list[str] = []
        for level in range(minor, 4, -1):
            tags.append(f"manylinux_{major}_{level}_{self.machine}")
            if level in named and (level == 17 or self.machine == "x86_64"):
                tags.append(f"{named[level]}_{self.machine}")
        return (*tags, f"linux_{self.machine}")

    def short_python(self) -> str:
        return ".".join(self.python.split(".")[:2])

    def markers(self) -> dict[str, str]:
        """What a requirement's marker sees there."""
        return {
            "os_name": "posix",
            "sys_platform": "darwin" if self.system == "Darwin" else "linux",
            "platform_system": self.system,
            "platform_machine": self.machine,
            "platform_release": "",
            "platform_version": "",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "implementation_version": self.python,
            "python_version": self.short_python(),
            "python_full_version": self.python,
        }

    def text(self) -> str:
        what = "macOS" if self.system == "Darwin" else "glibc"
        return f"Python {self.python} on {self.machine} ({what} {self.platform[0]}.{self.platform[1]})"


def target_of(python: dict[str, Any]) -> Target:
    """From what a node says about one of its Pythons. StageFailed for a system without wheels."""
    version = ".".join(str(int(part)) for part in python["version"][:3])
    system, machine = str(python["system"]), str(python["machine"])
    machine = {"amd64": "x86_64", "arm64": "arm64" if system == "Darwin" else "aarch64"}.get(machine, machine)
    if system == "Darwin":
        numbers = re.findall(r"\d+", str(python["macos"]))
        if machine != "arm64":
            raise StageFailed(
                f"{python['path']} is built for Intel processors; MLX and current torch need Apple silicon's own",
                fix="install one for arm64 there (python.org, or Homebrew in /opt/homebrew) or name it in cluster.yaml",
            )
    else:
        libc, numbers = str(python["libc"][0]), re.findall(r"\d+", str(python["libc"][1]))
        if libc != "glibc":
            raise StageFailed(
                f"{python['path']} is not built for glibc; torch has no packages for other C libraries",
                fix="use a node with Debian, Ubuntu, Fedora or another system with glibc",
            )
    if system not in ("Linux", "Darwin") or machine not in ("x86_64", "aarch64", "arm64") or len(numbers) < 2:
        raise StageFailed(
            f"there are no packages for {system} on {machine} ({python['path']})",
            fix="nodes are Macs with Apple silicon and Linux machines with x86_64 or aarch64",
        )
    shape = {"system": system, "machine": machine, "python": version, "platform": [int(n) for n in numbers[:2]]}
    return msgspec.convert(shape, Target)


def kind_of(wanted: str | None, facts: dict[str, Any]) -> Kind:
    """`device_type` of the cluster file, or what the node looks like."""
    if wanted == "mac" or (wanted is None and facts.get("system") == "Darwin"):
        return "mac"
    if wanted is not None:
        return "nvidia" if wanted == "nvidia" else "cpu"
    return "nvidia" if facts.get("nvidia") is True else "cpu"


def requirements(kind: Kind) -> tuple[str, ...]:
    """What a node of this kind needs, from Jupiter's own metadata: the extras `work` and the kind's own, and of the
    rest what is not the console's."""
    found: list[str] = []
    for line in metadata.requires("jupiter") or ():
        match = _REQUIREMENT.fullmatch(line)
        if match is None:
            continue
        name, extras, version, marker = match.groups()
        extra = _EXTRA.search(marker or "")
        wanted = extra is None or extra.group(1) in ("work", kind)
        if wanted and name not in CONSOLE_ONLY | NOT_ON[kind] | {"jupiter"}:
            found.append(f"{name}{extras or ''}{version.strip()}")
    return tuple(sorted(found))


def lowest_versions(wanted: tuple[str, ...]) -> dict[str, str]:
    """Package -> lowest version that will do, for a Python that is used as it is."""
    lowest: dict[str, str] = {}
    for line in wanted:
        match = _REQUIREMENT.fullmatch(line)
        assert match is not None, line
        bound = re.search(r"[>=]=\s*([0-9][^,\s]*)", match.group(3))
        lowest[match.group(1)] = bound.group(1) if bound else "0"
    return lowest


def installed_versions(wanted: tuple[str, ...]) -> dict[str, str]:
    """Versions here of what is wanted and all it needs, as far as it is installed: nodes get the same."""
    versions: dict[str, str] = {}
    pending = [match.group(1) for line in wanted if (match := _REQUIREMENT.fullmatch(line))]
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in versions:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        versions[name] = found.version
        for line in found.requires or ():
            match = _REQUIREMENT.fullmatch(line)
            if match is not None and not _EXTRA.search(match.group(4) or ""):
                pending.append(match.group(1))
    return versions


def key_of(target: Target, wanted: tuple[str, ...], constraints: tuple[str, ...]) -> str:
    """Name of the lock for this target and these requirements."""
    return hashlib.sha256(msgspec.json.encode([target, wanted, constraints])).hexdigest()[:32]
