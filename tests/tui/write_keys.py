"""Put the registry's key tables into docs/console.md: `python -m tests.tui.write_keys`."""

from __future__ import annotations

from pathlib import Path

from jupiter_tui.actions import keyboard_table

BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"


def write(path: Path) -> None:
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{keyboard_table().strip()}\n\n{END}{after}")


if __name__ == "__main__":
    write(Path(__file__).parents[2] / "docs" / "console.md")
