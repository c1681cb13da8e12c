"""The commands that the workshop adds to `flextron`, found by the entry points of pyproject.toml."""
