"""The dense model's answers in vLLM, token by token those of transformers, and by ranks that are killed meanwhile."""

import json
from types import SimpleNamespace

import pytest
from engine_marks import python_of
from made_stages import stage_of
from ranks import killing, metrics_of, run_stage
from tiny import save_tiny, tiny_text, tiny_tokenizer

from hfprune_dist.stages import answers
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
COUNT = 70  # three batches, of which the first rank gets two


@pytest.mark.engine("vllm")
def test_ranks_that_are_killed_go_on_in_vllm_with_what_transformers_would_say(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, text = save_tiny(tmp_path / "model", hidden_size=128), tmp_path / "text.jsonl"  # heads of 32, its smallest
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    own = {"eos_token_id": [2, 30, 99], "repetition_penalty": 9.0, "do_sample": True}
    (model / "generation_config.json").write_text(json.dumps(own))
    asked = ([{"role": "user", "content": tiny_text(1 + number % 3, number)}] for number in range(COUNT))
    text.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in asked))
    inputs = {role: Input(role, str(path)) for role, path in {"model": model, "text": text}.items()}
    settings = {"text": "instructions", "answers": "dense", "sequence_length": 64}
    stage = stage_of("answers", "tiny", {"recovery": settings}, inputs)
    written, stores = {}, {name: Store(tmp_path / name) for name in ("transformers", "vllm")}
    in_vllm = {"engine_pythons": {"vllm": python_of("vllm")}}
    reading = SimpleNamespace(params=stage.params, input_if_any=lambda _: text, progress=Progress(None))
    names = [*answers._batches(reading, tokenizer)[1]]
    ended = run_stage(stores["vllm"], stage, 2, environment=killing(0, 1, f".{names[2]}"), **in_vllm)
    kept = [file for name in names if (file := stores["vllm"].handle(stage.id).work / name).exists()]
    assert ended.returncode != 0 and 0 < len(kept) < 3, ended.output
    assert {json.loads(file.read_text())["engine"].partition(" ")[0] for file in kept} == {"vllm"}
    for name, runtime in (("vllm", in_vllm), ("transformers", {})):
        ended = run_stage(stores[name], stage, 2, **runtime)
        assert ended.returncode == 0, ended.output
        written[name] = (stores[name].handle(stage.id).artifact / "answers.jsonl").read_text()
        metrics = metrics_of(stores[name], stage)
        assert metrics["engine"].startswith(f"{name} ") and 0 < metrics["unfinished_pairs"] < metrics["pairs"]
    assert written["vllm"] == written["transformers"] and len(written["vllm"].splitlines()) > COUNT // 2
