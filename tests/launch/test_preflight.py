"""Bad texts, models, tasks and pairs: one clear message and exit code 2 before the first stage, also in a dry run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hfprune_launch import sweep
from hfprune_launch.modes import sweep_run
from safetensors.torch import load_file, save_file
from sweeps import make_inputs
from tiny import tiny_text

CALIBRATION, HELD_OUT, PAIRS = "calibration.path", "evaluation.fidelity.path", "recovery.path"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 500\n"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def inputs(pristine, tmp_path):
    """A copy of good inputs, to be damaged; its lm-eval task reads the data next to it."""
    shutil.copytree(pristine, tmp_path / "inputs")
    task = tmp_path / "inputs" / "tasks" / "choice.yaml"
    task.write_text(task.read_text().replace(str(pristine), str(tmp_path / "inputs")))
    return tmp_path / "inputs"


@pytest.fixture
def refusal(inputs, tmp_path, monkeypatch, capsys):
    """Return the message with which a sweep and its dry run refuse the inputs, or one of the two alone."""

    class Stages:
        def __init__(self, *_):
            self.ranks = 2

        def run(self, stage, _):
            pytest.fail(f"{stage.kind} {stage.label} began")

    def message(*arguments, ways=(("--dry-run",), ())):
        return [_refuse(inputs, tmp_path / "out", capsys, *arguments, *way) for way in ways][-1]

    monkeypatch.setattr(sweep_run, "LocalBackend", Stages)
    return message


def _refuse(inputs, out, capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        sweep.main(["--config", str(inputs / "tiny.yaml"), "--out", str(out), *arguments])
    assert ended.value.code == 2
    assert not out.exists(), "nothing is written"
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    return printed


def assert_parts(message, *parts):
    for part in parts:
        assert part in message, message


def test_good_inputs_reach_the_first_stage(inputs, tmp_path, refusal):
    arguments = ["--config", str(inputs / "tiny.yaml"), "--out", str(tmp_path / "out")]
    assert sweep.main([*arguments, "--dry-run"]) == 0
    with pytest.raises(pytest.fail.Exception, match=r"importance alpha began"):
        sweep.main(arguments)


# Texts.

DOCUMENT = tiny_text(40, 0)
LINE = json.dumps({"text": DOCUMENT, "instruction": "ask", "response": "tell"})


def test_gpus_that_torch_cannot_use(refusal, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPUs (1) that torch can't use" in refusal()


@pytest.mark.parametrize("key", [CALIBRATION, HELD_OUT, PAIRS])
def test_unreadable_text(inputs, refusal, key):
    (inputs / "cut.jsonl").write_text(f"{LINE}\n{LINE[:-9]}")
    assert_parts(refusal("--set", f"{key}={inputs / 'cut.jsonl'}"), "cut.jsonl:2", "not valid JSON", "cut short")


TOO_SHORT = [
    ("empty.txt", ""),
    ("short.jsonl", "\n".join([json.dumps({"text": ""}), json.dumps({"text": "short"})])),
]


@pytest.mark.parametrize("key", [CALIBRATION, HELD_OUT])
@pytest.mark.parametrize(("name", "content"), TOO_SHORT, ids=[name for name, _ in TOO_SHORT])
def test_no_document_is_long_enough(inputs, refusal, key, name, content):
    (inputs / name).write_text(content)
    message = refusal("--set", f"{key}={inputs / name}")
    assert_parts(message, name, "no document has 31 tokens", "the longest has", "sequence_length")


def make_pipe(file):
    os.mkfifo(file)


def make_folder_without_texts(file):
    file.mkdir()
    (file / "README.md").write_text("# Texts\n")


def make_saved_data_set(file):
    file.mkdir()
    (file / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    (file / "state.json").write_text("{}")


def make_link_to_nowhere(file):
    file.symlink_to("nowhere")


@pytest.mark.parametrize("key", [CALIBRATION, HELD_OUT, PAIRS])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (make_pipe, ["neither a file nor a folder"]),
        (make_folder_without_texts, ["no file that ends in", ".jsonl"]),
        (make_saved_data_set, [".arrow", ".parquet"]),
        (make_link_to_nowhere, ["given", "No such file"]),
        (lambda file: None, ["given", "No such file"]),
    ],
    ids=["pipe", "folder", "saved", "link", "missing"],
)
def test_paths_without_text(inputs, refusal, key, make, expected):
    make(inputs / "given")
    assert_parts(refusal("--set", f"{key}={inputs / 'given'}"), *expected)


# Instruction pairs.


def pairs(**fields):
    return "\n".join(json.dumps({"instruction": "ask", "response": "tell", **fields}) for _ in range(3)) + "\n"


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (pairs(response=" \n"), [], ["none of 3 pairs", "response token"]),
        (pairs(instruction="x" * 400), [], ["none of 3 pairs", "recovery.sequence_length 320"]),
        (pairs(), ["recovery.sequence_length=64"], ["recovery.sequence_length 64", "behind the template"]),
        (pairs(), ["recovery.response_field=instruction"], ["response_field", "instruction_field"]),
    ],
)
def test_pairs_without_anything_to_train_on(inputs, refusal, content, arguments, expected):
    (inputs / "pairs.jsonl").write_text(content)
    settings = [part for argument in arguments for part in ("--set", argument)]
    assert_parts(refusal(*settings), *expected)


def test_plain_text_has_no_pairs(inputs, refusal):
    (inputs / "pairs.txt").write_text(DOCUMENT)
    message = refusal("--set", f"{PAIRS}={inputs / 'pairs.txt'}")
    assert_parts(message, "pairs.txt", "plain text", "instruction", ".jsonl")


# Models.


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def configured(**changes):
    return lambda model: edit(model / "config.json", **changes)


def edit_weights(model, change):
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def replaced(name, tensor):
    return lambda model: edit_weights(model, lambda weights: weights.__setitem__(name, tensor))


def lacking(part):
    def damage(model):
        edit_weights(model, lambda weights: [weights.pop(name) for name in list(weights) if part in name])

    return damage


def pointing(name):
    return lambda model: (model / name).write_text(LFS_POINTER)


def emptied_of_weights(*files):
    def damage(model):
        (model / "model.safetensors").unlink()
        for file in files:
            (model / file).write_bytes(b"data")

    return damage


def emptied(*files):
    def damage(model):
        shutil.rmtree(model)
        model.mkdir()
        for file in files:
            (model / file).parent.mkdir(parents=True, exist_ok=True)
            (model / file).write_text("{}")

    return damage


def sharded(model, **weight_map):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, members in halves.items():
        save_file({name: weights[name] for name in members}, model / file)
    index = {name: file for file, members in halves.items() for name in members}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**index, **weight_map}}))
    return weights, names


def with_a_tensor_twice(model):
    weights, names = sharded(model)
    kept = {name: weights[name] for name in names[len(names) // 2 :]}
    save_file({**kept, names[0]: weights[names[0]]}, model / "b.safetensors")


def with_token(content, identity):
    def damage(model):
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        added = {**tokenizer["added_tokens"][0], "content": content, "id": identity}
        tokenizer["added_tokens"].append(added)
        tokenizer["model"]["vocab"][content] = identity
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))

    return damage


def without_eos(model):
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))


Q = "model.layers.1.self_attn.q_proj.weight"
MODELS = {
    "mllama": (configured(model_type="mllama", vision_config={}, text_config={}), ["mllama", "images", "llama"]),
    "vision": (configured(vision_config={"hidden_size": 8}), ["vision_config", "images"]),
    "experts": (configured(num_experts=8), ["num_experts", "experts"]),
    "heads": (configured(num_attention_heads=5), ["num_attention_heads 5"]),
    "key heads": (configured(num_key_value_heads=3), ["num_key_value_heads 3"]),
    "activation": (configured(hidden_act="sillu"), ["config.json", "sillu"]),
    "positions": (configured(max_position_embeddings=16), ["calibration.sequence_length 32", "16"]),
    "layers": (configured(num_hidden_layers=3), ["layers.2", "missing"]),
    "config is a list": (lambda model: (model / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "weights pointer": (pointing("model.safetensors"), ["model.safetensors", "Git LFS pointer", "git lfs pull"]),
    "q shape": (replaced(Q, torch.zeros(16, 32)), [Q, "[16, 32]", "[32, 32]"]),
    "bias in a layer": (
        replaced(Q.replace("weight", "bias"), torch.zeros(32)),
        ["q_proj.bias", "layer 1"],
    ),
    "no q": (lacking("q_proj"), ["q_proj.weight", "missing"]),
    "no tensors": (lacking(""), ["model.safetensors", "no tensors"]),
    "float8": (replaced(Q, torch.zeros(32, 32).to(torch.float8_e4m3fn)), [Q, "F8_E4M3", "quantized"]),
    "tensor twice": (with_a_tensor_twice, ["a.safetensors", "b.safetensors", "lm_head.weight"]),
    "gguf": (emptied_of_weights("model-q4.gguf"), ["GGUF", "safetensors"]),
    "pickle": (emptied_of_weights("pytorch_model.bin"), ["pytorch_model.bin", "save_pretrained"]),
    "no weights": (emptied_of_weights(), ["only safetensors"]),
    "adapter": (emptied("adapter_config.json", "adapter_model.safetensors"), ["adapter", "merge_and_unload"]),
    "hub cache": (emptied("snapshots/0123/config.json", "refs/main"), ["hub cache", "snapshots/0123"]),
    "empty folder": (emptied(), ["config.json", "missing"]),
    "tokenizer cut": (lambda model: (model / "tokenizer.json").write_text('{"version"'), ["tokenizer can't be loaded"]),
    "large token": (with_token("<far>", 300), ["'<far>'", "300", "264 rows"]),
    "no eos": (without_eos, ["no end-of-sequence token"]),
}


@pytest.mark.parametrize(("damage", "expected"), MODELS.values(), ids=MODELS)
def test_models(inputs, refusal, damage, expected):
    damage(inputs / "alpha")
    assert_parts(refusal(), *expected)


def test_an_unreadable_file(inputs, refusal, monkeypatch):
    """Root can read every file, so the operating system's refusal is simulated."""
    whole_open = Path.open

    def locked(self, *arguments, **options):
        if self.name in ("calibration.jsonl", "locked.txt"):
            raise PermissionError(13, "Permission denied", str(self))
        return whole_open(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", locked)
    assert_parts(refusal(), "calibration.jsonl", "Permission denied")


@pytest.mark.parametrize("key", ["calibration", "evaluation.fidelity", "recovery"])
def test_windows_longer_than_the_models_positions(refusal, key):
    message = refusal("--set", f"{key}.sequence_length=513")
    assert_parts(message, f"{key}.sequence_length 513", "max_position_embeddings", "512", "alpha")


def test_a_chat_template_is_needed_where_it_is_applied(refusal):
    assert_parts(refusal("--set", "evaluation.apply_chat_template=true"), "alpha", "chat template")


# Tasks.


def test_a_misspelt_task(refusal, tmp_path, monkeypatch):
    """lm-eval's index reads all tasks that are beside it, which takes 12 s; here there are a few of them."""
    from lm_eval.tasks import manager

    shutil.copytree(Path(manager.__file__).parent / "arc", tmp_path / "shipped" / "arc")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "shipped" / "manager.py"))
    message = refusal("--set", "evaluation.tasks=[tiny_choise, arc_esy, arc_easy]")
    assert_parts(message, "'tiny_choise'; did you mean 'tiny_choice'?", "'arc_esy'; did you mean 'arc_easy'?\n")
    assert "'arc_easy';" not in message


def test_a_folder_of_tasks_that_is_gone(inputs, refusal):
    shutil.rmtree(inputs / "tasks")
    assert_parts(refusal(), "tasks", "no such folder")
