"""The dense model's answers: what a plain ``generate`` says to each prompt, on any ranks and after any death."""

import json
import shutil
from itertools import pairwise

import pyarrow
import pytest
import torch
from made_stages import stage_of
from pyarrow import parquet
from ranks import run_here, run_stage
from tiny import save_tiny, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM
from worlds import Death, Ranks, run_in_threads

from hfprune_dist.data.examples import prompt_for
from hfprune_dist.data.instructions import PackedRows
from hfprune_dist.data.schedule import IGNORED
from hfprune_dist.data.text import identity_of
from hfprune_dist.errors import UserError
from hfprune_dist.planning.user_files import ChangedInputError
from hfprune_dist.stages import answers
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
TEXT = {"text": "instructions", "answers": "dense", "sequence_length": 320, "answer_share": 0.05}
TEXT |= {"answer_batch_size": 3}
NEW = 16


def write_model(folder, ends=(2,), template=TEMPLATE):
    """Write a model whose own settings of generation would change its answers but for the tokens that end them."""
    save_tiny(folder, hidden_size=256, intermediate_size=416)  # DeepSpeed shards no smaller ones
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
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


def stage_in(source, file="text.jsonl", **text):
    files = {"model": source / "model", "text": source / file}
    inputs = {role: Input(role, str(file)) for role, file in files.items()}
    return stage_of("answers", "tiny", {"recovery": TEXT | text}, inputs)


def file_of(store, stage):
    return store.handle(stage.id).artifact / "answers.jsonl"


def records_of(store, stage):
    return [json.loads(line) for line in file_of(store, stage).read_text().splitlines()]


def ids_of(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def plain_answer(model, prompt):
    """What a loop over the most likely tokens makes of a prompt."""
    ids = ids_of(prompt)
    for _ in range(NEW):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-NEW:]


def plain_answers(source):
    model = AutoModelForCausalLM.from_pretrained(source / "model")
    records = map(json.loads, (source / "text.jsonl").read_text().splitlines()[:8])
    prompts = [f"<s>{prompt_for(record['instruction'], record.get('input', ''))}" for record in records]
    return [plain_answer(model, prompt) for prompt in [*prompts, "<user>ab</s><assistant>"]]


def learn(store, answers):
    """Train on answers; return the questions and answers in its rows, in any order, as tokens."""
    inputs = {"model": answers.inputs["model"], "answers": answers.as_input()}
    recover = stage_of("recover", "tiny", {"recovery": TEXT | {"batch_size": 2, "max_steps": 1}}, inputs)
    known = {*(store.root / "rows").glob("*")}
    metrics = run_here(store, recover)
    (file,) = {*(store.root / "rows").iterdir()} - known or known
    rows = PackedRows(file)
    examples = []
    for row in map(rows, range(rows.counts["rows"])):
        starts = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), len(row["labels"])]
        for start, end in pairwise(starts):
            ids, trained = row["input_ids"][start:end], row["labels"][start:end] != IGNORED
            examples += [(ids[~trained].tolist(), ids[trained].tolist())] if trained.any() else []
    assert len(examples) == metrics["pairs"] and metrics["dropped_pairs"] == 0
    return examples


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    store, stage = Store(tmp_path_factory.mktemp("alone")), stage_in(source)
    metrics = run_here(store, stage)
    return store, stage, metrics


def test_greedy_answers_are_those_to_each_prompt_alone(source, alone):
    """In batches, with padding; without the penalties that come with the checkpoint."""
    store, stage, metrics = alone
    records, expected = records_of(store, stage), plain_answers(source)
    assert [record["response_ids"] for record in records] == expected and len({*map(str, expected)}) > 5
    assert [record["response"] for record in records] == [tiny_tokenizer().decode(ids) for ids in expected]
    assert "### Input:\nthat\n" in records[2]["prompt"] and records[2]["unfinished"]
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
    records = records_of(store, stage)
    assert [record["unfinished"] for record in records] == [length == NEW for length in cut if length]
    said = [ids[: length + 1] for ids, length in zip(plain, cut, strict=True) if length]
    assert [record["response_ids"] for record in records] == said
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
        run_in_threads(store, stage, Ranks(2, deaths={0: 5}))
    kept = list(store.handle(stage.id).work.glob("????????????????????.json"))
    assert 0 < len(kept) < 3
    asked, answer = [], answers._answers
    monkeypatch.setattr(answers, "_answers", lambda *those, **how: asked.append(1) or answer(*those, **how))
    run_in_threads(store, stage, Ranks(1))
    assert len(asked) == 3 - len(kept)
    assert file_of(store, stage).read_bytes() == file_of(*alone[:2]).read_bytes()


SAID = "<assistant>{{ m.content }}</s>"
MARKED = "{% if m.role == 'assistant' %}{% generation %}" + SAID + "{% endgeneration %}{% else %}"
MARKED = TEMPLATE.replace("<{{ m.role }}>", MARKED + "<{{ m.role }}>").replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)
REASONING = TEMPLATE.replace("<assistant>", "<assistant><think>")


@pytest.mark.parametrize("template", [TEMPLATE, MARKED, REASONING], ids=["plain", "marked", "reasoning"])
def test_training_learns_what_was_said_token_by_token(tmp_path, template):
    """Whatever a template makes of an assistant's turn, and of bytes that are no characters; the end where one was."""
    header = "<assistant><think>" if template == REASONING else "<assistant>"
    questions = [f"<user>{tiny_text(1, number)}</s>{header}" for number in range(6)]
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    said = [plain_answer(model, question) for question in questions]
    end = said[0][3]
    write_model(tmp_path / "model", (2, end), template)
    chats = [
        [{"role": "user", "content": tiny_text(1, number)}, {"role": "assistant", "content": "unread"}]
        for number in range(6)
    ]
    parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "text.parquet")
    store, stage = Store(tmp_path / "store"), stage_in(tmp_path, file="text.parquet")
    run_here(store, stage)
    cut = [next((place for place, token in enumerate(ids) if token in (2, end)), NEW) for ids in said]
    answered = zip(questions, said, cut, strict=True)
    expected = [(ids_of(question), ids[: length + 1]) for question, ids, length in answered if length]
    assert sorted(learn(store, stage)) == sorted(expected)
    assert {len(ids) == NEW for _, ids in expected} == {True, False}


def test_answers_that_are_made_again_are_learnt(source, tmp_path, monkeypatch):
    """Though they are those of the same stage: their bits may differ on GPUs."""
    store, stage = Store(tmp_path), stage_in(source)
    run_here(store, stage)
    before = learn(store, stage)
    for kind in ("answers", "recover"):
        shutil.rmtree(store.root / kind)
    answer = answers._answers
    others = {"response": "other", "response_ids": [7], "unfinished": True}
    monkeypatch.setattr(
        answers, "_answers", lambda *those, **how: {n: one | others for n, one in answer(*those, **how).items()}
    )
    run_here(store, stage)
    assert {str(ids) for _, ids in learn(store, stage)} == {"[7]"} != {str(ids) for _, ids in before}


def test_no_batch_is_kept_of_inputs_that_change(source, tmp_path, monkeypatch):
    file, asked, answer = tmp_path / "text.jsonl", [], answers._answers
    file.write_bytes((source / "text.jsonl").read_bytes())
    text = Input(identity_of(file, FileHashes(None)), str(file), content="text")
    stage = stage_of("answers", "tiny", {"recovery": TEXT}, {"model": stage_in(source).inputs["model"], "text": text})

    def change_and_answer(*those, **how):
        asked.append(file.write_text("{}"))
        return answer(*those, **how)

    monkeypatch.setattr(answers, "_answers", change_and_answer)
    with pytest.raises(ChangedInputError):
        run_here(Store(tmp_path / "store"), stage)
    assert len(asked) == 1
