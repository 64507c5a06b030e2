"""The schema of all knobs, and the presets: flat `name = literal` files that are parsed, never run."""
