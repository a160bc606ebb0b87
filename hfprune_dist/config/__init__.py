"""The settings of a sweep, and how they are read from files and flags."""
