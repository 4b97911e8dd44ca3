"""One evaluator for every method: full ranking and its metrics."""
