"""The experiments that `benchmarks/reproduce.py` repeats, seed by seed."""
