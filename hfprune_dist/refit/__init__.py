"""New weights for what stays: refits of all layers, and the search for widths."""
