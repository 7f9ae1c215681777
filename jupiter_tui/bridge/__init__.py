"""The only room of the console that talks to the engine's api.

Two threads, so that nothing ever blocks the event loop: one reads the workspace four times a second
and posts whole `Pictured` messages (a newer one replaces an older one that was not handled yet); the
other carries out commands in order and awaits the engine's answers. Each owns its own Workspace.
Machines are looked after by a third thread, the api's own, once the Fleet page has been looked at.
"""

from jupiter_tui.bridge.bridge import Bridge
from jupiter_tui.bridge.messages import Broken, KeyAsked, Pictured
from jupiter_tui.bridge.threads import Opener, open_workspace

__all__ = ["Bridge", "Broken", "KeyAsked", "Opener", "Pictured", "open_workspace"]
