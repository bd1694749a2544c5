"""Sessions on disk to batches: readers of formats, loader, packing of files."""
