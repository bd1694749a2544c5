"""Simulated sessions in the T15 layout."""
