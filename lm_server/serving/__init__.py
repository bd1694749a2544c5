"""The server and the workers behind Redis."""
