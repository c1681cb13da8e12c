"""The demonstration: the models that it can start from, and their way through every stage."""
