"""Grammars of Kaldi and OpenFst."""
