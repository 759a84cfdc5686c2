"""What inference engines accept: contracts as data, a check of a checkpoint against them, launch commands."""
