"""Estimation from text: counting, modified Kneser-Ney smoothing, pruning."""
