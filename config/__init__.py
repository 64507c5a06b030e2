"""All knobs of a run, how they are read, and the presets, which are parsed and never executed."""
