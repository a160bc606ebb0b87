"""Tables from finished cells."""
