"""Pronunciations: a dictionary, letters to phonemes, and the words of training text."""
