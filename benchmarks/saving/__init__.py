"""How long a checkpoint takes, and what a crash loses."""
