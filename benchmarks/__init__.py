"""What qsdp sends, takes and learns, measured; README.md is the index."""
