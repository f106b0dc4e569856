"""Rows of a user's files as token ids for next-token prediction."""
