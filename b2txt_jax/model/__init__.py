"""Models: their interface, the two of this package, and parts to build with."""
