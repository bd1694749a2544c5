"""Which trials a batch has, which shape it has, and where they are in its rows."""
