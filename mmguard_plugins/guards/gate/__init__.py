"""Scores text, pictures and answers by category in milliseconds."""
