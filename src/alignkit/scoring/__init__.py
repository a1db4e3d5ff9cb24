"""Scorers, which say how good a text is, and the measures of how new and how varied a set of texts is."""
