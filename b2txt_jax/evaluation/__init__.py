"""Scoring of decoded sentences, report and figures, the evaluation command."""
