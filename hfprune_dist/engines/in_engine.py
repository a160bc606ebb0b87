"""Run token sequences in an engine, by the Python of an environment that has it; needs nothing else.

``python in_engine.py ENGINE`` ends with 1 if this Python lacks it. ``python in_engine.py ENGINE REQUEST ANSWER``, two
JSON files: REQUEST has the ``model``, ``options`` of its loader, and ``sequences`` of token ids, each a prompt and some
``new_tokens``; or the arguments of ``_time_vllm`` or ``_answer_vllm``. ANSWER gets ``version``, and ``runs``, one a
sequence: ``log_probs`` of the prompt but its first token, and the ``new`` ones that the engine chooses, in float32; or
what those functions return; or ``error``, what it says of the model; or ``unable``, why it can't run.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Sequences = Sequence[list[int]]
Runs = list[dict[str, Any]]


def main() -> None:
    """Answer the request."""
    modules, run = ENGINES[sys.argv[1]]
    if len(sys.argv) == 2:
        sys.exit(None in map(importlib.util.find_spec, modules))
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"version": sys.argv[1]}
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: who asks may die
        for number in (signal.SIGTERM, signal.SIGUSR2):  # of Slurm, on which who asks acts
            signal.signal(number, signal.SIG_IGN)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DO_NOT_TRACK="1", VLLM_NO_USAGE_STATS="1")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")
    try:
        version = importlib.import_module(modules[0]).__version__
        answer["version"] = f"{modules[0]} {version.partition('-')[0]}"  # without OpenVINO's commit
        if "workloads" in request:
            answer["runs"] = _time_vllm(**request)
        elif "prompts" in request:
            answer["runs"] = _answer_vllm(**request)
        else:
            answer["runs"] = run(request["model"], request["sequences"], request["new_tokens"], **request["options"])
    except BaseException as error:  # of an engine, anything; some end the interpreter
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        of_the_machine = isinstance(error, (ImportError, MemoryError, KeyboardInterrupt))
        of_the_machine |= re.search("memory|space left", told, re.IGNORECASE) is not None
        answer["unable" if of_the_machine else "error"] = told
    Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")
    os._exit(0)  # engines may hang, or abort, as the interpreter ends


def _run_of(logits: Any, ids: list[int], new_tokens: int) -> dict[str, Any]:
    """The run of an engine that gives logits, or log-probabilities, of a whole sequence: [tokens, vocabulary]."""
    import numpy as np

    logits = np.asarray(logits, dtype=np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    told = [float(row[token]) for row, token in zip(log_probs, ids[1:])]  # noqa: B905
    return {"log_probs": told, "new": logits[-new_tokens - 1 : -1].argmax(axis=-1).tolist()}


def _vllm(model: str, sequences: Sequences, new_tokens: int, **options: Any) -> Runs:
    """vLLM gives no logits of a whole sequence: it generates the new tokens itself."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    from vllm import LLM, SamplingParams

    few = {"max_model_len": max(map(len, sequences)), "max_num_seqs": len(sequences)}
    engine: Any = LLM(model=model, dtype="float32", seed=0, enforce_eager=True, **few, **options)  # compiling: minutes
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=1)
    prompts, runs = [{"prompt_token_ids": ids[:-new_tokens]} for ids in sequences], []
    for made in engine.generate(prompts, sampling, use_tqdm=False):
        pairs = zip(made.prompt_logprobs[1:], made.prompt_token_ids[1:])  # noqa: B905
        told = [found[token].logprob for found, token in pairs]
        runs.append({"log_probs": told, "new": list(made.outputs[0].token_ids)})
    return runs


def _time_vllm(
    models: dict[str, dict[str, Any]], workloads: list[Sequences], new_tokens: int, repeats: int, threads: int
) -> list[dict[str, list[list[float]]]]:
    """Let models, given by options of the loader, generate in turn from all prompts of a workload, first untimed.

    Returns:
        of each workload: model -> of each generation, the seconds until the first new token, and from it to the last,
        by the median over prompts.
    """
    import torch
    from vllm import SamplingParams

    torch.set_num_threads(threads)
    alike = {"enable_prefix_caching": False, "disable_log_stats": False}
    engines = {name: _vllm_with_cache(**alike, **options) for name, options in models.items()}
    sampling, runs = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False), []
    for sequences in workloads:
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in sequences]
        seconds: dict[str, list[list[float]]] = {name: [] for name in models}
        for _ in range(repeats + 1):
            for name, engine in engines.items():
                found = [made.metrics for made in engine.generate(prompts, sampling, use_tqdm=False)]
                others = median(one.last_token_ts - one.first_token_ts for one in found)
                seconds[name].append([median(one.first_token_latency for one in found), others])
        runs.append({name: times[1:] for name, times in seconds.items()})
    return runs


def _answer_vllm(options: Any, prompts: Sequences, seeds: Sequence[int], sampling: Any) -> list[list[int]]:
    """What a model, by options of its loader, says after each prompt, drawn by a seed each: tokens, with the end."""
    from vllm import SamplingParams

    each = [SamplingParams(seed=seed, detokenize=False, **sampling) for seed in seeds]
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    made = _vllm_with_cache(**options).generate(asked, each, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in made]


def _vllm_with_cache(**options: Any) -> Any:
    """An engine whose cache has ``kv_cache_memory_bytes``: a share of the memory, instead, would have to be free."""
    import torch
    from vllm import LLM

    eager = not torch.cuda.is_available()  # compiling for a CPU takes minutes, and a compiler
    return LLM(enforce_eager=eager, seed=0, gpu_memory_utilization=0.05, **options)


def _llama_cpp(model: str, sequences: Sequences, new_tokens: int, **_: Any) -> Runs:
    import numpy as np
    from llama_cpp_py_sync import Llama

    runs = []
    for ids in sequences:
        loaded, rows = Llama(model, n_ctx=len(ids), n_threads=1, type_k="f32", type_v="f32"), []
        for place, token in enumerate(ids):
            loaded._eval_tokens([token], place)
            row = loaded._lib.llama_get_logits_ith(loaded._ctx, -1)
            rows.append(np.frombuffer(loaded._ffi.buffer(row, 4 * loaded.n_vocab), np.float32).copy())
        runs.append(_run_of(rows, ids, new_tokens))
    return runs


def _openvino(model: str, sequences: Sequences, new_tokens: int, **options: Any) -> Runs:
    import torch
    from optimum.intel import OVModelForCausalLM

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    loaded = OVModelForCausalLM.from_pretrained(model, export=True, load_in_8bit=False, ov_config=exact, **options)
    logits = (loaded(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long()).logits[0] for ids in sequences)
    return [_run_of(rows, ids, new_tokens) for rows, ids in zip(logits, sequences)]  # noqa: B905


def _mlx(model: str, sequences: Sequences, new_tokens: int, **_: Any) -> Runs:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    loaded, _ = load_model(Path(model), strict=True, lazy=True)
    loaded.set_dtype(mx.float32)
    return [_run_of(loaded(mx.array([ids]))[0].astype(mx.float32), ids, new_tokens) for ids in sequences]


def _ctranslate2(model: str, sequences: Sequences, new_tokens: int, **options: Any) -> Runs:
    import ctranslate2
    import numpy as np
    from ctranslate2.converters import TransformersConverter

    folder = TransformersConverter(model, **options).convert(tempfile.mkdtemp(), force=True)
    loaded = ctranslate2.Generator(folder, device="cpu", compute_type="float32")
    return [_run_of(np.array(loaded.forward_batch([ids]))[0], ids, new_tokens) for ids in sequences]


# Engine -> the modules that it needs, of which the first has its version, and what runs it.
ENGINES: dict[str, tuple[tuple[str, ...], Callable[..., Runs]]] = {
    "vllm": (("vllm",), _vllm),
    "llama.cpp": (("llama_cpp_py_sync", "numpy"), _llama_cpp),
    "openvino": (("openvino", "optimum.intel", "torch"), _openvino),
    "mlx": (("mlx_lm", "mlx.core"), _mlx),
    "ctranslate2": (("ctranslate2", "transformers", "torch"), _ctranslate2),
}

if __name__ == "__main__":
    main()
