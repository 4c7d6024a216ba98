"""Asking a person: which of two responses is better, until the answer would hardly matter."""
