"""`mmguard demo`: a real vision-language model behind mmguard, on real cases.

This package puts adapters and trainers together, so it may import both; nothing imports it but the
command line.
"""
