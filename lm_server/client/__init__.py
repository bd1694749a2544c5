"""What talks to servers and workers: numpy and redis only."""
