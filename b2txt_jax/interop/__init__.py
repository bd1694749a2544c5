"""Weights, recipes and optimizer state from and to other frameworks; no torch is needed."""
