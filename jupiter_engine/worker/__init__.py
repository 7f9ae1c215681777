"""The program started on a machine: reads one order, emits facts, writes results."""
