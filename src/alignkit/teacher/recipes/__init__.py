"""Recipes: what to ask the teacher, and how to read its answer."""
