"""Models: loading a base with its adapter, the reward model, the embedded tiny model."""
