"""The commands: their flags, and how they end."""
