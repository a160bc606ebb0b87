"""One module per stage, each with ``run(context)``. Stages read and write artifacts and never import each other."""
