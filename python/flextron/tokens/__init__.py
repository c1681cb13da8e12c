"""Folders of tokens: text that was tokenised once, in parallel, into files that are read in place."""
