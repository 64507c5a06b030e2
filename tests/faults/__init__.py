"""Faults on purpose: each module breaks one thing about a run, many times, and counts what came of
it.

`make faults` runs every fault and prints one table. `make test` makes a quick try of most
(test_faults.py). Read harness.py first; then any module; mutants.py last, which takes protections
out of the program to show that every fault can fail.
"""
