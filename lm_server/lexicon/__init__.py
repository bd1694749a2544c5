"""Pronouncing dictionaries, guessed pronunciations, and the words of training text."""
