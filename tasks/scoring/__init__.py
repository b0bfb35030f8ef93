"""Scores of text, each with what makes it comparable."""
