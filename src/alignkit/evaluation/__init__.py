"""Held-out scores of models, with their uncertainty."""
