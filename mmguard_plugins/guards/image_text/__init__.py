"""Reads the words in pictures and hands them to every guard that reads text."""
