"""Brain-to-text decoding in JAX: neural features to phoneme probabilities to sentences."""

__version__ = "0.1.0"
