"""A trained run put to use: logits, and the client of the language-model server."""
