"""Comparing and measuring: nothing here is needed to train."""
