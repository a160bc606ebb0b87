"""What the commands do once their command lines are parsed."""
