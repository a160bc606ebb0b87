"""Implementations of the commands, called once their command lines are parsed."""
