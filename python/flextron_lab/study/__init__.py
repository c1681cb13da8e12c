"""The study of the method's claims on small parents: `plan.py` sets it up, `run.py` runs it, `results.py` reads it."""
