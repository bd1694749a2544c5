"""One page about runs: `b2txt report`."""
