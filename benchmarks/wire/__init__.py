"""What crosses the wire, and what that makes of a step's time."""
