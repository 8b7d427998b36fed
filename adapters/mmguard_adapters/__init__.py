"""Glue between mmguard and the frameworks that serve models; one folder for each framework.

Nothing is patched by importing: every patch is put on by a function someone called, after
`versions.require`, through a `patching.PatchSet` that takes it back exactly. What clients read
comes from `refusal` only.
"""
