"""Phoneme probabilities to sentences: a language model server that talks over Redis streams or files."""
