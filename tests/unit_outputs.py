"""Where a model's units are observed, as in the calibration pass."""

from hfprune_dist.core.observers import SeenUnits


def seen_units(model, kinds):
    """Return the units of some kinds, given as ``Units``, in all layers of a model."""
    return [
        SeenUnits(units.kind, layer, output, units.channels_per_unit, rows_of(units, model, layer))
        for units in kinds
        for layer, output in enumerate(outputs_of(units, model))
    ]


def outputs_of(units, model):
    """Return the output projections of a model's layers."""
    return [model.get_submodule(units.tensor(layer, units.output)) for layer in range(units.num_layers)]


def rows_of(units, model, layer):
    names = zip(units.weights[:-1], units.row_parts, strict=True)
    return [(model.get_submodule(units.tensor(layer, name).removesuffix(".weight")), parts) for name, parts in names]
