"""What is taken beside the wire: steps of methods, memory, starts, growth."""
