"""The torch twin."""

from __future__ import annotations

import os

# Read by the OpenMP runtime when torch is loaded. Its default lets threads that wait for each other spin, which
# takes the cores from whatever else the machine's owner runs; asleep they cost some speed on an idle machine
# (numbers in docs/experiments/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
