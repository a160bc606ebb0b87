"""Output projections of a model's units, and the projections that feed them, as the calibration pass has them."""

from hfprune_dist.core.observers import UnitOutputs


def unit_outputs(units, model):
    rows = [
        [
            (model.get_submodule(name.removesuffix(".weight")), parts)
            for name, parts in zip(units.row_weights(layer), units.row_parts, strict=True)
        ]
        for layer in range(units.num_layers)
    ]
    return UnitOutputs(units.outputs_of(model), units.channels_per_unit, rows)
