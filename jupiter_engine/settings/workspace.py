"""A workspace: the folder with config/ and .jupiter/, found, made and read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from jupiter_engine.errors import ConfigError, JupiterError, UsageError
from jupiter_engine.files import write_atomic
from jupiter_engine.protocol.specs import Name
from jupiter_engine.settings.domain import load_domain
from jupiter_engine.settings.reader import NAME_PATTERN, nearest, shown

CLUSTER_FILE: Final = Path("config") / "cluster.yaml"
DOMAINS: Final = Path("config") / "domains"
TEMPLATE: Final = "_template.yaml"

_SOURCES_README = """\
Put the texts of the domain "{name}" into this folder (subfolders are fine): files that end in
.md, .rst, .txt or .py. They are read as UTF-8. Then run

    jupiter check
    jupiter start --domain {name}

Other endings, what to leave out and the licence of the texts are set under `sources` in
../{name}.yaml. This file has no ending on purpose: it is not read as a text of the domain.
"""


def shipped_folder() -> Path:
    """The config folder that Jupiter comes with: inside an installed package, else the source tree's."""
    package = Path(__file__).parent / "shipped"
    if (package / "cluster.yaml").is_file():
        return package
    checkout = Path(__file__).parents[2] / "config"
    if (checkout / "cluster.yaml").is_file():
        return checkout
    raise JupiterError(f"the shipped settings are missing from {package}", fix="install Jupiter again")


def _has_cluster_file(path: Path) -> bool:
    try:
        return (path / CLUSTER_FILE).is_file()
    except OSError:  # no permission, a name too long: whoever uses the folder next says which
        return False


def find_workspace(explicit: Path | None, environ: Mapping[str, str], cwd: Path) -> Path:
    """Where the workspace is; the folder need not exist yet.

    In this order: `explicit` (--workspace), $JUPITER_HOME, `cwd` if it holds config/cluster.yaml,
    ~/.jupiter. The result is absolute. Jupiter's own source checkout, whose config/ is what is
    shipped, is no workspace.
    """
    if explicit is not None:
        return cwd / explicit
    home = environ.get("JUPITER_HOME", "")
    if home:
        return cwd / Path(home).expanduser()
    if _has_cluster_file(cwd) and (cwd / "config").resolve() != shipped_folder().resolve():
        return cwd
    return Path(environ.get("HOME") or Path.home()).absolute() / ".jupiter"


def create(path: Path) -> list[Path]:
    """Make `path` a workspace by copying the shipped settings; returns the files written.

    A workspace that has its config/cluster.yaml is left exactly as it is, so a file the user
    removed does not come back. The cluster file is written last: a copy that was cut short is
    completed the next time.
    """
    if _has_cluster_file(path):
        return []
    return init(path)


def init(path: Path) -> list[Path]:
    """Write every shipped settings file that `path` lacks (none is overwritten); returns the files written."""
    shipped = shipped_folder()
    sources = [*sorted((shipped / "domains").glob("*.yaml")), shipped / "cluster.yaml"]
    written: list[Path] = []
    try:
        (path / DOMAINS).mkdir(parents=True, exist_ok=True)
        (path / ".jupiter").mkdir(exist_ok=True)
        for source in sources:
            target = path / "config" / source.relative_to(shipped)
            if not target.exists():
                write_atomic(target, source.read_bytes())
                written.append(target)
    except OSError as error:
        raise _unusable(path, error) from error
    return written


def _unusable(path: Path, error: OSError) -> ConfigError:
    detail = f"{shown(path)} cannot be used as a workspace: {error.strerror or error}"
    return ConfigError(detail, fix="choose another folder with --workspace or $JUPITER_HOME")


def domains(path: Path) -> list[str]:
    """Names of the workspace's domains, sorted; files that begin with `_` or `.` are patterns, not domains."""
    return sorted(file.stem for file in (path / DOMAINS).glob("*.yaml") if not file.name.startswith(("_", ".")))


def domain_file(path: Path, name: str) -> Path:
    """The file of domain `name`; raises ConfigError with the nearest name if there is none."""
    known = domains(path)
    if name in known:
        return path / DOMAINS / f"{name}.yaml"
    for wrong in (path / DOMAINS / f"{name}.yml", path / DOMAINS / f"{name}.YAML"):
        if re.fullmatch(NAME_PATTERN, name) and wrong.is_file():
            raise ConfigError(f"{shown(wrong)} is not read; domain files end in .yaml", fix=f"rename it to {name}.yaml")
    guess = nearest(name, known)
    hint = f"; did you mean {guess}?" if guess else ""
    have = ", ".join(known) if known else "none"
    raise ConfigError(
        f"there is no domain {json.dumps(name)} in {shown(path / DOMAINS)} (there: {have}){hint}",
        fix=f"make one with `jupiter new-domain {name}`" if re.fullmatch(NAME_PATTERN, name) else "name one of these",
    )


def unread(path: Path) -> tuple[str, ...]:
    """A sentence for every settings file of the workspace that nothing reads, because of its name or its folder."""
    config = path / "config"
    found: list[str] = []
    for file in sorted((*config.rglob("*.yaml"), *config.rglob("*.yml"))):
        inside = file.relative_to(config)
        if inside == Path("cluster.yaml") or (
            len(inside.parts) == 2 and file.suffix == ".yaml" and inside.parts[0] == "domains"
        ):
            continue
        why = "only config/cluster.yaml and config/domains/NAME.yaml are read"
        if inside.parts[0] == "experts":
            why = "there is no swarm of experts in this version; describe what the expert shall know as a domain"
        elif file.suffix == ".yml" and inside.parent in (Path("domains"), Path()):
            why = f"settings files end in .yaml; rename it to {file.stem}.yaml"
        elif inside.parts[0] == "domains" and len(inside.parts) > 2:
            continue  # a text of a domain that happens to be YAML
        found.append(f"{shown(file)} is not read: {why}.")
    return tuple(found)


def new_domain(path: Path, name: Name, description: str = "") -> Path:
    """Write config/domains/<name>.yaml from the template, and the folder its texts go into; returns the file.

    The result loads as it is. An existing domain is never overwritten (ConfigError).
    """
    if not re.fullmatch(NAME_PATTERN, name) or name.endswith("\n"):
        raise UsageError(
            f"{json.dumps(name)} cannot be the name of a domain",
            fix="use at most 63 small letters, digits, - and _, beginning with a letter or digit",
        )
    target = path / DOMAINS / f"{name}.yaml"
    if target.exists():
        raise ConfigError(f"{shown(target)} exists already", fix="choose another name, or edit that file")
    template = path / DOMAINS / TEMPLATE
    if not template.is_file():
        template = shipped_folder() / "domains" / TEMPLATE
    text = _filled(template, name, description)
    folder = path / DOMAINS / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "README").exists():
            write_atomic(folder / "README", _SOURCES_README.format(name=name).encode())
        write_atomic(target, text.encode())
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        load_domain(target)
    except ConfigError:
        # The workspace's own template is broken; leave no broken domain behind.
        target.unlink()
        raise
    return target


def _filled(template: Path, name: str, description: str) -> str:
    """The template's text with its name and description put in."""
    old = load_domain(template).value.domain
    text = template.read_text(encoding="utf-8-sig")
    # The template's name is one word that stands nowhere else by chance (my_domain).
    text = re.sub(rf"(?<![\w-]){re.escape(old.name)}(?![\w-])", name, text)
    flat = " ".join("".join(c if c.isprintable() else " " for c in description).split())
    line = f"  description: {json.dumps(flat or f'What an expert on {name} knows', ensure_ascii=False)}"
    return re.sub(r"(?m)^  description:.*$", lambda _: line, text, count=1)
