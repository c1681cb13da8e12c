"""The demonstration: the models it starts from (:mod:`.parents`) and the way through every stage."""
