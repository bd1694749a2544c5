"""Where bins come from, one file each."""
