"""What all pages share: the bridge, the newest picture and how the console was opened."""

from __future__ import annotations

from dataclasses import dataclass, field

from jupiter_tui.bridge import Bridge
from jupiter_tui.view.picture import Picture


@dataclass
class Desk:
    bridge: Bridge
    read_only: bool = False
    picture: Picture = field(default_factory=Picture)
