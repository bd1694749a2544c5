"""Where words go, one file each."""
