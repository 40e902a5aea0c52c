"""Training that fits the model in memory once."""
