"""Finding the texts that a question is about."""
