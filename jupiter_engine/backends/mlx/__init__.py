"""The MLX twin. Importing the package readies a fast BLAS before any of its modules loads mlx.core."""

from __future__ import annotations

from jupiter_engine.backends.mlx import blas

blas.preload()
