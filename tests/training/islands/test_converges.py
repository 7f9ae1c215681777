"""An MLX island and a torch island, two ranks each, against plain data parallel training: loss and bytes.

The settings and what exactly is compared are those of scripts/bench/islands.py (comparison.Settings).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.islands.comparison import Settings, compare
from tests.training.islands.runs import two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_islands_come_within_one_percent_of_data_parallel_with_a_hundredth_of_the_bytes(tmp_path: Path) -> None:
    found = compare(tmp_path, Settings(), {"macs": two_ranks("mlx"), "boxes": two_ranks("torch")})
    assert found.loss_ratio < 1.01, found
    assert found.bytes_ratio >= 100.0, found
    # The comparison means something: there was much to learn after the common beginning, and the islands learnt it.
    assert found.plain_loss < found.warm_loss - 0.1, found
    assert found.kept > 0.8, found
