"""The windows of text that units are scored on, cut once, by rank 0, for all attempts at an importance stage."""

from __future__ import annotations

from hfprune_dist.checkpoints.tensor_files import is_usable
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.data.windows import WINDOWS, Sampling, Source, Windows, read_mixture, read_windows, save_windows
from hfprune_dist.distributed.sums import windows_held_out
from hfprune_dist.kinds.importance import ImportanceParameters
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_object, write_json

Context = AnyContext[ImportanceParameters]

# File in the work folder with counts of the documents behind the windows.
COUNTS = "windows.json"


def prepare_windows(context: Context) -> dict[str, int]:
    """Cut the windows into the work folder, unless an earlier attempt already has.

    Returns:
        counts for the manifest.
    """
    return context.world.on_rank0(lambda: _windows_counted(context))


def _windows_counted(context: Context) -> dict[str, int]:
    counts = read_object(context.work / COUNTS)
    if counts is None or not is_usable(context.work / WINDOWS):
        windows = _cut_windows(context)
        save_windows(windows.input_ids_ST, context.work)
        counts = {"documents_read": windows.documents_read, "documents_used": windows.documents_used}
        write_json(context.work / COUNTS, counts)
    return counts


def _cut_windows(context: Context) -> Windows:
    settings = context.params.calibration
    sampling = Sampling(settings.samples, settings.sequence_length, context.params.seed, context.params.add_bos_token)
    tokenizer = load_tokenizer(context.input_path("model"))
    sources = [
        Source(
            share.text.model_dump(),
            context.input_path(share.role) if context.has_input(share.role) else None,
            share.windows,
        )
        for share in settings.shares()
    ]
    if settings.mixture is None:
        return read_windows(sources[0].settings, sources[0].path, tokenizer, sampling, "calibration")
    apart = windows_held_out(settings.samples, settings.micro_batch_size)
    return read_mixture(sources, tokenizer, sampling, apart, "calibration")
