"""TPU programs compiled without a TPU, with their memory, traffic and estimated time."""
