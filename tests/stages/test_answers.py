"""The dense model's answers: what a plain ``generate`` says to each prompt, on any ranks and after any death."""

import json
import shutil
from itertools import pairwise

import pyarrow
import pytest
import torch
import transformers
from made_stages import stage_of
from pyarrow import parquet
from ranks import finish, metrics_of, run_here
from tiny import save_tiny, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from worlds import Death, Ranks, run_in_threads

from hfprune_dist.data.instructions import PackedRows
from hfprune_dist.data.schedule import IGNORED
from hfprune_dist.data.text import identity_of
from hfprune_dist.distributed import frozen_model
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import GIB, Gpus, Passes
from hfprune_dist.planning.user_files import ChangedInputError
from hfprune_dist.stages import answers
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
TEXT = {"text": "instructions", "answers": "dense", "sequence_length": 64}
NEW = 32  # and as many are left for a question


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(answers, "BATCH", 4)


def write_model(folder, ends=(2,), template=TEMPLATE, **options):
    """Write a model whose own settings of generation would change its answers but for the tokens that end them."""
    save_tiny(folder, hidden_size=256, intermediate_size=416, **options)  # DeepSpeed shards no smaller ones
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
    records = [chat_of("user", tiny_text(1 + number % 3, number)) for number in range(70)]
    (folder / "many.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    records[8:] = [{"instruction": "leaves no room", "response": 7}]
    records.append(chat_of("user", "ab", "assistant", "never", "user", "read"))
    records.append(chat_of("assistant", "asks nothing"))
    (folder / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def chat_of(*turns):
    return {
        "messages": [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2], strict=True)]
    }


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


def cut(ids, ends=(2,)):
    """What is said up to a token that ends it, and with it."""
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), NEW)]


def plain_answers(source):
    model = AutoModelForCausalLM.from_pretrained(source / "model")
    asked = [*(tiny_text(1 + number % 3, number) for number in range(8)), "ab"]
    return [plain_answer(model, f"<user>{text}</s><assistant>") for text in asked]


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
    records, expected = records_of(store, stage), [*map(cut, plain_answers(source))]
    assert [record["response_ids"] for record in records] == expected and len({*map(str, expected)}) > 5
    said = [tiny_tokenizer().decode(ids, skip_special_tokens=True) for ids in expected]
    assert [record["response"] for record in records] == said
    assert records[8]["prompt"] == "<user>ab</s><assistant>"
    counts = {"pairs": 9, "dropped_pairs": 2, "unfinished_pairs": sum(2 not in ids for ids in expected)}
    assert metrics.items() >= {**counts, "engine": f"transformers {transformers.__version__}"}.items()


def test_answers_end_with_any_token_of_the_checkpoint_that_ends_them(source, tmp_path):
    """One whose first token is such a token is empty, and dropped; if all are, the stage has no result."""
    (tmp_path / "text.jsonl").write_bytes((source / "text.jsonl").read_bytes())
    plain, store, stage = plain_answers(source), Store(tmp_path / "store"), stage_in(tmp_path)
    ends = {2, plain[0][0], plain[1][3]}
    write_model(tmp_path / "model", ends)
    metrics = run_here(store, stage)
    said = [ids for ids in (cut(ids, ends) for ids in plain) if len(ids) > 1]
    unfinished = [ends.isdisjoint(ids) for ids in said]
    assert {True, False} == {*unfinished} and len(said) < 9
    assert metrics["pairs"] == len(said) and metrics["unfinished_pairs"] == sum(unfinished)
    records = records_of(store, stage)
    assert [record["unfinished"] for record in records] == unfinished
    assert [record["response_ids"] for record in records] == said
    write_model(tmp_path / "model", {ids[0] for ids in plain})
    told = "recovery: of 11 instructions, 9 leave room for answers, and the dense model gives none; raise"
    with pytest.raises(UserError, match=told):
        run_here(Store(tmp_path / "none"), stage)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"answer_temperature": 0.7}], ids=["greedy", "drawn"])
def test_two_ranks_with_whole_or_sharded_weights_write_the_file_of_one(source, tmp_path, settings):
    """The batches are no multiple of the ranks."""
    stage, files = stage_in(source, "many.jsonl", **settings), set()
    for ranks, sharding in ((1, "replicate"), (2, "replicate"), (2, "zero3")):
        store = Store(tmp_path / f"{ranks} {sharding}")
        finish(store, stage, ranks, sharding=sharding)
        files.add(file_of(store, stage).read_bytes())
    said = [record["response_ids"] for record in records_of(store, stage)[:8]]
    greedy = said == [*map(cut, plain_answers(source)[:8])]
    assert len(files) == 1 and greedy == (not settings)


def test_a_killed_stage_goes_on_with_the_batches_that_are_missing(source, alone, tmp_path, monkeypatch):
    store, stage = Store(tmp_path), alone[1]
    with pytest.raises(Death):
        run_in_threads(store, stage, Ranks(2, deaths={0: 5}))
    kept = list(store.handle(stage.id).work.glob("????????????????????.json"))
    assert 0 < len(kept) < 3
    asked, generate = [], LlamaForCausalLM.generate
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda *those, **how: asked.append(1) or generate(*those, **how))
    run_in_threads(store, stage, Ranks(1))
    assert len(asked) == 3 - len(kept)
    assert file_of(store, stage).read_bytes() == file_of(*alone[:2]).read_bytes()


def test_fewer_instructions_at_once_than_a_batch_has_get_the_same_answers(source, alone, tmp_path, monkeypatch):
    """As where memory is short."""
    rows, generate, store = [], LlamaForCausalLM.generate, Store(tmp_path)

    def counting(module, **asked):
        rows.append(len(asked["input_ids"]))
        return generate(module, **asked)

    monkeypatch.setattr(LlamaForCausalLM, "generate", counting)
    monkeypatch.setattr(answers, "passes", lambda *_: Passes(3))
    run_here(store, alone[1])
    assert rows == [3, 1, 3, 1, 1]
    assert file_of(store, alone[1]).read_bytes() == file_of(*alone[:2]).read_bytes()


@pytest.fixture
def vllm(monkeypatch):
    """What a stand-in for vLLM was asked by each rank; it says one token and the end."""
    asked = []

    def run(engine, python, _folder, request):
        asked.append(request)
        return f"{engine} 1", [[7, 2] for _ in request["prompts"]]

    monkeypatch.setattr(answers, "runs_of", run)
    return asked


def test_each_rank_asks_vllm_for_its_batches_and_what_transformers_wrote_stays(source, alone, tmp_path, vllm):
    """As drawn as transformers would, from the same tokens and up to the same ends."""
    store, stage = Store(tmp_path), stage_in(source, answer_temperature=0.5)
    with pytest.raises(Death):
        run_in_threads(store, stage, Ranks(1, deaths={0: 5}))
    kept = [*store.handle(stage.id).work.glob("????????????????????.json")]
    assert len(kept) == 1 and not vllm
    run_in_threads(store, stage, Ranks(3), engine_pythons={"vllm": "python"})
    assert len(vllm) == 2, "one rank has nothing to ask for"
    asked = [ids for request in vllm for ids in request["prompts"]]
    records = records_of(store, stage)
    assert sorted(asked) == sorted(record["prompt_ids"] for record in records if record["response_ids"] == [7, 2])
    assert 0 < len(asked) < 9 and len({seed for request in vllm for seed in request["seeds"]}) == len(asked)
    assert vllm[0]["sampling"] == {"temperature": 0.5, "max_tokens": NEW, "stop_token_ids": [2]}
    assert metrics_of(store, stage)["engine"] == f"transformers {transformers.__version__}, vllm 1"


GPU = Gpus(1, 80 * GIB)
BIASED = {"variant": "llama-tied-biases", "output_biases": ["mlp.down_proj"]}


@pytest.mark.parametrize(
    ("model", "gpus", "settings", "told"),
    [
        ({}, GPU, {}, "by transformers\n"),
        ({}, GPU, {"engine_pythons": {"vllm": "python"}}, ""),
        ({}, Gpus(2, 2**16), {"engine_pythons": {"vllm": "python"}}, "since a rank lacks the memory for the whole"),
        ({}, Gpus(2, 80 * GIB), {"engine_pythons": {"vllm": "python"}, "sharding": "zero3"}, "since a rank lacks"),
        (BIASED, GPU, {"engine_pythons": {"vllm": "python"}}, "since vllm would not load the model: it has no biases"),
    ],
)
def test_vllm_answers_if_it_is_there_and_holds_the_model(
    tmp_path, source, monkeypatch, capsys, vllm, model, gpus, settings, told
):
    for module in (answers, frozen_model):
        monkeypatch.setattr(module, "gpus_here", lambda _: gpus)
    loaded = []

    def load(*options):
        loaded.append(options[2])
        return FrozenModel(*options[:2], "replicate", options[3])

    monkeypatch.setattr(answers, "FrozenModel", load)
    write_model(tmp_path / "model", **model)
    shutil.copy(source / "text.jsonl", tmp_path)
    engine = run_here(Store(tmp_path / "store"), stage_in(tmp_path), **settings)["engine"]
    printed = capsys.readouterr().out
    assert engine.startswith("transformers " if told else "vllm ") and (told in printed if told else not printed)
    assert loaded == (["zero3" if "sharding" in settings else "replicate"] if told else [])
    for options in (request["options"] for request in vllm):
        assert options["max_num_seqs"] == 256 and options["kv_cache_memory_bytes"] < GIB


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
    answered = [(ids_of(question), cut(ids, (2, end))) for question, ids in zip(questions, said, strict=True)]
    expected = [(question, ids) for question, ids in answered if len(ids) > 1]
    assert sorted(learn(store, stage)) == sorted(expected)
    assert {len(ids) == NEW for _, ids in expected} == {True, False}


def test_answers_that_are_made_again_are_learnt(source, tmp_path, monkeypatch):
    """Though they are those of the same stage: their bits may differ on GPUs."""
    store, stage = Store(tmp_path), stage_in(source)
    run_here(store, stage)
    before = learn(store, stage)
    for kind in ("answers", "recover"):
        shutil.rmtree(store.root / kind)
    record, others = answers._record, {"response": "other", "response_ids": [7], "unfinished": True}
    monkeypatch.setattr(answers, "_record", lambda *those: record(*those) | others)
    run_here(store, stage)
    assert {str(ids) for _, ids in learn(store, stage)} == {"[7]"} != {str(ids) for _, ids in before}


def test_no_batch_is_kept_of_inputs_that_change(source, tmp_path, monkeypatch):
    file, asked, generate = tmp_path / "text.jsonl", [], LlamaForCausalLM.generate
    file.write_bytes((source / "text.jsonl").read_bytes())
    text = Input(identity_of(file, FileHashes(None)), str(file), content="text")
    stage = stage_of("answers", "tiny", {"recovery": TEXT}, {"model": stage_in(source).inputs["model"], "text": text})

    def change_and_answer(*those, **how):
        asked.append(file.write_text("{}"))
        return generate(*those, **how)

    monkeypatch.setattr(LlamaForCausalLM, "generate", change_and_answer)
    with pytest.raises(ChangedInputError):
        run_here(Store(tmp_path / "store"), stage)
    assert len(asked) == 1
