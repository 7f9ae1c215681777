"""The torch twin."""

from __future__ import annotations

import os

# Read by the OpenMP runtime when torch is loaded. Its default lets threads that wait for each other spin; with
# other programs on the same cores that is ruinous (measured with five of them on two cores: 115 CPU seconds
# spinning against 15 asleep for the same work), while waking costs microseconds on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
