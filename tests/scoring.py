"""The importance stage over a tiny model."""

from tiny import importance_stage, save_tiny, write_documents


def make_stage(
    folder,
    variant="llama",
    *,
    criteria=("entropy",),
    structures=None,
    student=None,
    dtype="float32",
    sizes=None,
    **calibration,
):
    """Return the stage over the model and text in a folder, which are made if they aren't there."""
    if not (folder / "model").exists():
        save_tiny(folder / "model", variant, **(sizes or {}))
        write_documents(folder / "text.jsonl", count=32)
    settings = {"samples": 11, "sequence_length": 32, "micro_batch_size": 2, "shard_size": 1, "text_field": "text"}
    params = {"calibration": settings | calibration, "criteria": sorted(criteria), "dtype": dtype}
    params |= {"structures": list(structures)} if structures else {}
    params |= {"student": student} if student else {}
    return importance_stage(folder, variant, params | {"add_bos_token": True, "seed": 3})
