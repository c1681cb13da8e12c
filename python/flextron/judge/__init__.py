"""Judging a model at a dial: its loss, and its time on this machine."""
