"""Scores of answers: pure functions of texts, and what needs a model to be taken."""
