"""What a trained model knows: scores, search, reports, comparisons."""
