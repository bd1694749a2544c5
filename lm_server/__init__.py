"""Phoneme probabilities to sentences: a language model server on Redis streams or files."""
