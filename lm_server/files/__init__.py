"""Files, read with care and written whole: what both packages and every room share."""
