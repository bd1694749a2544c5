"""Weights, recipes and optimizer state, converted from and to other frameworks without torch."""
