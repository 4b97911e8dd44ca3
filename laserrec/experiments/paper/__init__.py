"""Every table and figure of the paper, each from one list of named settings."""
