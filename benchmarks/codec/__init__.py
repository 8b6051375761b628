"""How fast the codec is."""
