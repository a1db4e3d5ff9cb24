"""Training: one thin layer over the trainers of TRL and transformers, and the only place that knows their names."""
