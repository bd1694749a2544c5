"""CTC, optimizer, steps, the loop, checkpoints."""
