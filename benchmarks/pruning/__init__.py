"""What compression leaves of a model, by the method that trained it."""
