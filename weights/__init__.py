"""Weights on a disk and in other forms: checkpoints and the lock on their folder, how a run or a
Hugging Face folder is opened, adapters, matrices for inference, and matrices rounded on trial.
"""
