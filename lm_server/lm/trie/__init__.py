"""The binary trie that KenLM reads."""
