"""Checks of an environment."""
