"""The dense model's answers: what a plain ``generate`` says to each prompt, on any ranks and after any death."""

import json

import pytest
import torch
from made_stages import stage_of
from ranks import run_here, run_stage
from tiny import save_tiny, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM
from worlds import Death, Ranks, run_in_threads

from hfprune_dist.data.examples import prompt_for
from hfprune_dist.errors import UserError
from hfprune_dist.stages import answers
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
TEXT = {"text": "instructions", "answers": "dense", "sequence_length": 320, "answer_share": 0.05}
TEXT |= {"answer_batch_size": 3}
NEW = 16


def write_model(folder, ends=(2,)):
    """Write a model whose own settings of generation would change its answers but for the tokens that end them."""
    save_tiny(folder, hidden_size=256, intermediate_size=416)  # DeepSpeed shards no smaller ones
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    own = {"eos_token_id": list(ends), "repetition_penalty": 9.0, "do_sample": True, "top_k": 2}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    write_model(folder / "model")
    records = [{"instruction": tiny_text(1 + number, number), "response": 7} for number in range(8)]
    records[2]["input"] = "that"
    records.append({"instruction": "x" * 200})  # which leaves no room
    chat = [("user", "ab"), ("assistant", "never"), ("user", "read")]
    records.append({"messages": [{"role": role, "content": content} for role, content in chat]})
    records.append({"messages": [{"role": "assistant", "content": "asks nothing"}]})
    (folder / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def stage_in(source, **text):
    files = {"model": source / "model", "text": source / "text.jsonl"}
    inputs = {role: Input(role, str(file)) for role, file in files.items()}
    return stage_of("answers", "tiny", {"recovery": TEXT | text}, inputs)


def file_of(store, stage):
    return store.handle(stage.id).artifact / "answers.jsonl"


def records_of(store, stage):
    return [json.loads(line) for line in file_of(store, stage).read_text().splitlines()]


@torch.no_grad()
def plain_answers(source):
    """What a loop over the most likely tokens makes of each prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source / "model"), tiny_tokenizer()
    records = map(json.loads, (source / "text.jsonl").read_text().splitlines()[:8])
    prompts = [f"<s>{prompt_for(record['instruction'], record.get('input', ''))}" for record in records]
    found = []
    for prompt in [*prompts, "<user>ab</s><assistant>"]:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[-NEW:])
    return found


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    store, stage = Store(tmp_path_factory.mktemp("alone")), stage_in(source)
    metrics = run_here(store, stage)
    return store, stage, metrics


def test_greedy_answers_are_those_to_each_prompt_alone(source, alone):
    """In batches, with padding; without the penalties that come with the checkpoint."""
    store, stage, metrics = alone
    *pairs, chat = records_of(store, stage)
    expected = [tiny_tokenizer().decode(ids, skip_special_tokens=True) for ids in plain_answers(source)]
    assert [pair["response"] for pair in pairs] + [chat["messages"][-1]["content"]] == expected
    assert len(set(expected)) > 5 and len(chat["messages"]) == 2
    assert pairs[2].items() > {"input": "that", "unfinished": True}.items()
    assert metrics.items() >= {"pairs": 9, "dropped_pairs": 2, "unfinished_pairs": 9}.items()


def test_answers_end_with_any_token_of_the_checkpoint_that_ends_them(source, tmp_path):
    """One whose first token is such a token is empty, and dropped; if all are, the stage has no result."""
    (tmp_path / "text.jsonl").write_bytes((source / "text.jsonl").read_bytes())
    plain, store, stage = plain_answers(source), Store(tmp_path / "store"), stage_in(tmp_path)
    ends = {2, plain[0][0], plain[1][3]}
    write_model(tmp_path / "model", ends)
    metrics = run_here(store, stage)
    cut = [next((place for place, token in enumerate(ids) if token in ends), NEW) for ids in plain]
    assert {0, NEW} < {*cut}
    assert metrics["pairs"] == 9 - cut.count(0) and metrics["unfinished_pairs"] == cut.count(NEW)
    assert [record["unfinished"] for record in records_of(store, stage)] == [length == NEW for length in cut if length]
    write_model(tmp_path / "model", {ids[0] for ids in plain})
    told = "recovery: of 11 instructions, 9 leave room for answers, and the dense model gives none; raise"
    with pytest.raises(UserError, match=told):
        run_here(Store(tmp_path / "none"), stage)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"answer_temperature": 0.7}], ids=["greedy", "drawn"])
def test_two_ranks_with_whole_or_sharded_weights_write_the_file_of_one(source, alone, tmp_path, settings):
    """The batches are no multiple of the ranks."""
    stage, files = stage_in(source, **settings), set()
    for ranks, sharding in ((1, "replicate"), (2, "replicate"), (2, "zero3")):
        store = Store(tmp_path / f"{ranks} {sharding}")
        ended = run_stage(store, stage, ranks, sharding=sharding)
        assert ended.returncode == 0, ended.output
        files.add(file_of(store, stage).read_bytes())
    assert len(files) == 1 and (file_of(*alone[:2]).read_bytes() in files) == (not settings)


def test_a_killed_stage_goes_on_with_the_batches_that_are_missing(source, alone, tmp_path, monkeypatch):
    store, stage = Store(tmp_path), alone[1]
    with pytest.raises(Death):
        run_in_threads(store, stage, Ranks(2, deaths={0: 3}))
    kept = list(store.handle(stage.id).work.glob("????????????????????.json"))
    assert 0 < len(kept) < 3
    asked, answer = [], answers._answers
    monkeypatch.setattr(answers, "_answers", lambda *those, **how: asked.append(1) or answer(*those, **how))
    run_in_threads(store, stage, Ranks(1))
    assert len(asked) == 3 - len(kept)
    assert file_of(store, stage).read_bytes() == file_of(*alone[:2]).read_bytes()


def test_training_reads_them_as_they_were_written(source, alone, tmp_path):
    """After the tokens that the model was asked with, it learns those of the answer; no end where it was cut."""
    store, stage, _ = alone
    inputs = {"model": stage.inputs["model"], "answers": stage.as_input()}
    recover = stage_of("recover", "tiny", {"recovery": TEXT | {"batch_size": 2, "max_steps": 1}}, inputs)
    metrics = run_here(store, recover)
    assert (metrics["pairs"], metrics["dropped_pairs"]) == (9, 0)
    texts = [
        record["messages"][-1]["content"] if "messages" in record else record["response"]
        for record in records_of(store, stage)
    ]
    encoded = [tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert metrics["trained_tokens"] == sum(map(len, encoded))
