"""Blocks configured phrases and patterns in requests, pictures' words and answers."""
