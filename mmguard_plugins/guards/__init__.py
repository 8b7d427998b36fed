"""The bundled guards, one folder each: `config.py` (options) and `guard.py` (the hooks)."""
