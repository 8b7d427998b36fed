"""Measures a guard against labelled sets, and against disguises of them."""
