"""Text in, token windows and training rows out."""
