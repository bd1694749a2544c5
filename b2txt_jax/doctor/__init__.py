"""Checks of an environment before training or decoding."""
