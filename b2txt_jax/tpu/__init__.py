"""TPU programs without a TPU: compiled for a named topology, then read for memory, traffic and
time."""
