"""Everything that knows an architecture: names of its parts, its checkpoint files, its aliases."""
