"""Tables, model cards and named checkpoints from finished cells."""
