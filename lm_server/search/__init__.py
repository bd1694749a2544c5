"""Logits to candidates: one file for each search, and what they share."""
