"""Raw files to a data folder: readers, cleaning, splits, histories and their text."""
