"""A run that was stopped and resumed is the run that was not."""
