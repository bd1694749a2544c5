"""Candidates to the answer, with a large language model where one is loaded."""
