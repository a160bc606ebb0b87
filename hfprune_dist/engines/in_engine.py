"""Run prompts in an engine, greedily, by the Python of an environment that has it; needs nothing but the engine.

``python in_engine.py REQUEST ANSWER``: two JSON files. REQUEST has ``engine``, ``model`` (what the engine loads),
``prompts`` (texts or token ids), ``new_tokens`` and ``options`` (how to load it). ANSWER gets ``version``, and in
``runs`` of each prompt: its token ``ids``, the ``log_probs`` of all but the first, the ``new`` tokens and, by
transformers, ``margins``, by which the first choice beat the second; or ``missing``, a module; or ``error``. It is
all computed in float32.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Prompt = Sequence[int]
Runs = list[dict[str, Any]]
# What a model makes of tokens that follow those before them: logits [tokens, vocabulary].
Step = Callable[[Prompt], Any]


def main() -> None:
    """Answer the request."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: who asks may die
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DO_NOT_TRACK="1", VLLM_NO_USAGE_STATS="1")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")
    (module, run), answer = ENGINES[request["engine"]], dict[str, Any]()
    try:
        version = importlib.import_module(module).__version__
        answer["version"] = f"{module} {version.partition('-')[0]}"  # without OpenVINO's commit
        answer["runs"] = run(request["model"], request["prompts"], request["new_tokens"], **request["options"])
    except ModuleNotFoundError as error:
        answer["missing"] = error.name
    except BaseException as error:  # of an engine, anything; some end the interpreter
        answer["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
    os._exit(0)  # engines may hang, or abort, as the interpreter ends


def _by_steps(start: Callable[[], Step], prompts: Sequence[Prompt], new_tokens: int) -> Runs:
    """The runs of an engine that gives logits; ``start`` begins a sequence."""
    import numpy as np

    runs = []
    for ids in prompts:
        step, new, margins = start(), list[int](), list[float]()
        logits = np.asarray(step(ids), dtype=np.float64)
        log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        while True:
            second, first = np.argsort(logits[-1])[-2:]
            new.append(int(first))
            margins.append(float(logits[-1][first] - logits[-1][second]))
            if len(new) == new_tokens:
                break
            logits = np.asarray(step(new[-1:]), dtype=np.float64)
        told = [float(row[token]) for row, token in zip(log_probs, ids[1:])]  # noqa: B905
        runs.append({"ids": list(ids), "log_probs": told, "new": new, "margins": margins})
    return runs


def _transformers(model: str, prompts: Sequence[str], new_tokens: int, **options: Any) -> Runs:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    longest = (getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or 2**20) - new_tokens

    def start() -> Step:
        cache = DynamicCache(config=loaded.config)

        @torch.no_grad()
        def step(ids: Prompt) -> Any:
            made = loaded(torch.tensor([list(ids)], device=device), past_key_values=cache, use_cache=True)
            return made.logits[0].float().cpu().numpy()

        return step

    return _by_steps(start, [tokenizer(text).input_ids[:longest] for text in prompts], new_tokens)


def _vllm(model: str, prompts: Sequence[Prompt], new_tokens: int, **options: Any) -> Runs:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    from vllm import LLM, SamplingParams

    length = max(map(len, prompts)) + new_tokens
    few = {"max_model_len": length, "max_num_seqs": len(prompts), "enforce_eager": True}  # compiling takes minutes
    engine: Any = LLM(model=model, dtype="float32", seed=0, **few, **options)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=1)
    runs = []
    for made in engine.generate([{"prompt_token_ids": list(ids)} for ids in prompts], sampling, use_tqdm=False):
        ids = made.prompt_token_ids
        told = [found[token].logprob for found, token in zip(made.prompt_logprobs[1:], ids[1:])]  # noqa: B905
        runs.append({"ids": ids, "log_probs": told, "new": list(made.outputs[0].token_ids)})
    return runs


def _llama_cpp(model: str, prompts: Sequence[Prompt], new_tokens: int) -> Runs:
    import numpy as np
    from llama_cpp_py_sync import Llama

    length = max(map(len, prompts)) + new_tokens

    def start() -> Step:
        loaded, places = Llama(model, n_ctx=length, type_k="f32", type_v="f32"), itertools.count()

        def logits_after(token: int) -> Any:
            loaded._eval_tokens([token], next(places))
            row = loaded._lib.llama_get_logits_ith(loaded._ctx, -1)
            return np.frombuffer(loaded._ffi.buffer(row, 4 * loaded.n_vocab), np.float32).copy()

        return lambda ids: np.stack([logits_after(token) for token in ids])

    return _by_steps(start, prompts, new_tokens)


def _openvino(model: str, prompts: Sequence[Prompt], new_tokens: int, **options: Any) -> Runs:
    import torch
    from optimum.intel import OVModelForCausalLM

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    loaded = OVModelForCausalLM.from_pretrained(model, export=True, load_in_8bit=False, ov_config=exact, **options)

    def start() -> Step:
        past, seen = None, 0

        def step(ids: Prompt) -> Any:
            nonlocal past, seen
            seen += len(ids)
            mask = torch.ones(1, seen, dtype=torch.int64)
            made = loaded(torch.tensor([list(ids)]), attention_mask=mask, past_key_values=past)
            past = made.past_key_values
            return made.logits[0].float().numpy()

        return step

    return _by_steps(start, prompts, new_tokens)


def _mlx(model: str, prompts: Sequence[Prompt], new_tokens: int) -> Runs:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    loaded, _ = load_model(Path(model), strict=True, lazy=True)
    loaded.set_dtype(mx.float32)

    def start() -> Step:
        cache = make_prompt_cache(loaded)
        return lambda ids: np.array(loaded(mx.array([list(ids)]), cache=cache)[0].astype(mx.float32))

    return _by_steps(start, prompts, new_tokens)


def _ctranslate2(model: str, prompts: Sequence[Prompt], new_tokens: int) -> Runs:
    import ctranslate2
    import numpy as np
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    tokens_of, runs = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens, []
    greedy = {"sampling_topk": 1, "max_length": new_tokens, "min_length": new_tokens, "end_token": []}
    with tempfile.TemporaryDirectory() as folder:
        TransformersConverter(model).convert(folder, force=True)
        loaded = ctranslate2.Generator(folder, device="cpu", compute_type="float32")
        for ids in prompts:
            rows = np.array(loaded.forward_batch([list(ids)], return_log_probs=True))[0]
            (made,) = loaded.generate_batch([tokens_of(list(ids))], include_prompt_in_result=False, **greedy)
            told = [float(row[token]) for row, token in zip(rows, ids[1:])]  # noqa: B905
            runs.append({"ids": list(ids), "log_probs": told, "new": list(made.sequences_ids[0])})
    return runs


# Engine -> the module whose version counts, and what runs it.
ENGINES: dict[str, tuple[str, Callable[..., Runs]]] = {
    "transformers": ("transformers", _transformers),
    "vllm": ("vllm", _vllm),
    "llama.cpp": ("llama_cpp_py_sync", _llama_cpp),
    "openvino": ("openvino", _openvino),
    "mlx": ("mlx_lm", _mlx),
    "ctranslate2": ("ctranslate2", _ctranslate2),
}

if __name__ == "__main__":
    main()
