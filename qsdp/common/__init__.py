"""What all rooms stand on; it knows none of them but ``compat``."""
