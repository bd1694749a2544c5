"""Live decoding: bins in, words out."""
