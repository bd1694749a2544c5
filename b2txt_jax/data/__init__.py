"""Sessions on disk to batches: readers of formats, plan, buckets, loader, packing."""
