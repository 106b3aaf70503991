"""Agreement of a prediction with ground truth."""
