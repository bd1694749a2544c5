"""The GRU decoder of the published system, and the recurrences that run it."""
