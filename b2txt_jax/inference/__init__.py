"""Logits of a trained run."""
