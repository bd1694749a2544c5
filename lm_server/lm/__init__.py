"""N-gram models: estimated from text, imported from ARPA and Kaldi, written and read."""
