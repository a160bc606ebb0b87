"""What every rank runs, and the files by which a backend and its ranks know of each other."""
