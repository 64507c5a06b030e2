"""Faults on purpose: each module here breaks one thing about a run, many times, and counts what came of it.

`make faults` runs all of it and prints one table; `make test` runs a few tries of each (test_faults.py).
"""
