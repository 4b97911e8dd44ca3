"""Small helpers that know nothing of recommenders: errors, files, progress, processes."""
