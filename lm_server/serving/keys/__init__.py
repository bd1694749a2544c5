"""What stands in Redis: which types keys have, who may use them, what is kept for a restart."""
