"""A user's own files: what is read of them, and the form that their columns have."""
