"""Scores of a trained model, search, reports and comparisons."""
