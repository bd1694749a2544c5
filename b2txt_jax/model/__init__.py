"""The decoder: day layer, patches, GRU, head."""
