"""Jupiter's engine: the cycle that collects, generates, trains, evaluates and decides."""

__version__ = "0.1.0"
