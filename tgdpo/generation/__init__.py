"""Sampling answers from models and scoring them: what the preference, evaluation and answer tools share."""
