"""The study: which of the method's claims hold on small parents. `run.py` runs it, `results.py` reads it."""
