"""The embedded tiny model: its tokenizer, its base text, its pre-training and its weights."""
