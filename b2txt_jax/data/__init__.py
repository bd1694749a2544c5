"""Sessions on disk to batches: reader, simulator, plan, loader."""
