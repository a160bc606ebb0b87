"""What a user may set, and how files and flags become it."""
