"""What programs of several rooms share; it imports from no other room."""
