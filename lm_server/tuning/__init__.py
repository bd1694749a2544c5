"""Settings found on sentences whose truth is known."""
