"""The data kit: files become validated rows, conversations become tokens and labels."""
