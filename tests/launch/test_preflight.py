"""Bad texts, models, tasks and pairs: one clear message and exit code 2 before the first stage, also in a dry run."""

import json
import os
import shutil
import struct
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
    ("short.txt", "Twenty-nine tokens or bytes."),
    ("short.jsonl", "\n".join([json.dumps({"text": ""}), json.dumps({"text": "short"})])),
    ("short.csv", "text\nshort\nalso short\n"),
    ("blank.jsonl", json.dumps({"text": ""})),
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
        (make_link_to_nowhere, ["nowhere", "No such file"]),
        (lambda file: None, ["given", "No such file"]),
    ],
    ids=["pipe", "folder", "saved", "link", "missing"],
)
def test_paths_without_text(inputs, refusal, key, make, expected):
    make(inputs / "given")
    assert_parts(refusal("--set", f"{key}={inputs / 'given'}"), *expected)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_devices_are_not_read(refusal, device):
    assert_parts(refusal("--set", f"calibration.path={device}"), device, "neither a file nor a folder")


# Instruction pairs.


def pairs(**fields):
    return "\n".join(json.dumps({"instruction": "ask", "response": "tell", **fields}) for _ in range(3)) + "\n"


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (pairs(response=" \n"), [], ["none of 3 pairs", "response token"]),
        (pairs(instruction="x" * 400), [], ["none of 3 pairs", "recovery.sequence_length 320"]),
        (
            pairs(),
            ["recovery.sequence_length=64"],
            ["recovery.sequence_length 64", "takes 141 tokens alone by the tokenizer of"],
        ),
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


def with_biases(model):
    edit_weights(model, lambda weights: weights.update({f"{BIAS.format(layer)}": torch.zeros(32) for layer in (0, 1)}))


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


def turned_into_file(model):
    shutil.rmtree(model)
    model.write_bytes(b"GGUF")


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


def with_a_wrong_index(model):
    _, names = sharded(model)
    edit_index(model, {names[0]: "b.safetensors"})


def with_a_missing_tensor_in_the_index(model):
    sharded(model)
    edit_index(model, {"model.layers.0.self_attn.extra.weight": "a.safetensors"})


def edit_index(model, changes):
    file = model / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {**json.loads(file.read_text())["weight_map"], **changes}}))


def with_an_index_besides(model):
    weights = load_file(model / "model.safetensors")
    save_file(weights, model / "other.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "other.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def with_overlapping_tensors(model):
    file = model / "model.safetensors"
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    moved = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["data_offsets"] = [moved[0] - 64, moved[1] - 64]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


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


BIAS = "model.layers.{}.self_attn.q_proj.bias"
Q, NORM, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
MODELS = {
    "mllama": (configured(model_type="mllama", vision_config={}, text_config={}), ["mllama", "images", "llama"]),
    "llava": (configured(model_type="llava", vision_config={}, text_config={}), ["llava", "num_hidden_layers"]),
    "vision": (configured(vision_config={"hidden_size": 8}), ["vision_config", "images"]),
    "t5": (configured(model_type="t5", is_encoder_decoder=True), ["t5", "encoder"]),
    "mixtral": (configured(model_type="mixtral", num_local_experts=8), ["mixtral", "experts"]),
    "qwen3_moe": (configured(model_type="qwen3_moe", num_experts=8), ["qwen3_moe", "experts"]),
    "experts": (configured(num_experts=8), ["num_experts", "experts"]),
    "heads": (configured(num_attention_heads=5), ["num_attention_heads 5"]),
    "no heads": (configured(num_attention_heads=0), ["num_attention_heads", "positive integer"]),
    "heads as text": (configured(num_attention_heads="4"), ["num_attention_heads", "positive integer"]),
    "key heads": (configured(num_key_value_heads=3), ["num_key_value_heads 3"]),
    "more key heads": (configured(num_key_value_heads=4), ["k_proj.weight", "[16, 32]", "[32, 32]"]),
    "head_dim": (configured(head_dim=16), ["q_proj.weight", "[32, 32]", "[64, 32]"]),
    "head_dim as text": (configured(head_dim="eight"), ["head_dim", "positive integer"]),
    "activation": (configured(hidden_act="sillu"), ["config.json", "sillu"]),
    "rope": (configured(rope_parameters={"rope_type": "strange", "rope_theta": 1e4}), ["config.json", "strange"]),
    "vocabulary": (configured(vocab_size=None), ["vocab_size", "positive integer"]),
    "positions": (configured(max_position_embeddings=16), ["calibration.sequence_length 32", "16"]),
    "positions as text": (configured(max_position_embeddings="many"), ["max_position_embeddings"]),
    "layers": (configured(num_hidden_layers=3), ["layers.2", "missing"]),
    "config is a list": (lambda model: (model / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "config not UTF-8": (lambda model: (model / "config.json").write_bytes(b'{"\xff'), ["config.json", "UTF-8"]),
    "config pointer": (pointing("config.json"), ["config.json", "Git LFS pointer"]),
    "weights pointer": (pointing("model.safetensors"), ["model.safetensors", "Git LFS pointer", "git lfs pull"]),
    "tokenizer pointer": (pointing("tokenizer.json"), ["tokenizer.json", "Git LFS pointer"]),
    "q shape": (replaced(Q, torch.zeros(16, 32)), [Q, "[16, 32]", "[32, 32]"]),
    "q flat": (replaced(Q, torch.zeros(1024)), [Q, "[1024]", "[32, 32]"]),
    "norm shape": (replaced(NORM, torch.zeros(31)), [NORM, "[31]", "[32]"]),
    "down shape": (replaced(DOWN, torch.zeros(31, 48)), [DOWN, "[31, 48]", "[32, 48]"]),
    "bias in a layer": (
        replaced(Q.replace("weight", "bias"), torch.zeros(32)),
        ["q_proj.bias", "layer 1"],
    ),
    "biases": (with_biases, ["q_proj.bias", "transformers would leave out"]),
    "no q": (lacking("q_proj"), ["q_proj.weight", "missing"]),
    "no norms": (lacking("input_layernorm"), ["input_layernorm.weight", "missing"]),
    "fused": (lacking("self_attn"), ["self_attn", "missing"]),
    "no tensors": (lacking(""), ["model.safetensors", "no tensors"]),
    "float8": (replaced(Q, torch.zeros(32, 32).to(torch.float8_e4m3fn)), [Q, "F8_E4M3", "quantized"]),
    "int8": (replaced(Q, torch.zeros(32, 32, dtype=torch.int8)), [Q, "I8", "quantized"]),
    "packed": (replaced(Q.replace("weight", "qweight"), torch.zeros(4, 32, dtype=torch.int32)), ["qweight", "I32"]),
    "tensor twice": (with_a_tensor_twice, ["a.safetensors", "b.safetensors", "lm_head.weight"]),
    "wrong index": (with_a_wrong_index, ["index.json", "b.safetensors", "lm_head.weight"]),
    "index with more": (with_a_missing_tensor_in_the_index, ["index.json", "extra.weight", "a.safetensors"]),
    "index besides": (with_an_index_besides, ["model.safetensors", "index.json", "both"]),
    "overlap": (with_overlapping_tensors, ["model.safetensors", "header"]),
    "gguf": (emptied_of_weights("model-q4.gguf"), ["GGUF", "safetensors"]),
    "pickle": (emptied_of_weights("pytorch_model.bin"), ["pytorch_model.bin", "save_pretrained"]),
    "pickle shards": (emptied_of_weights("pytorch_model-00001-of-00002.bin"), ["pytorch_model", "save_pretrained"]),
    "pth": (emptied_of_weights("consolidated.00.pth"), ["consolidated.00.pth", "convert"]),
    "no weights": (emptied_of_weights(), ["only safetensors"]),
    "adapter": (emptied("adapter_config.json", "adapter_model.safetensors"), ["adapter", "merge_and_unload"]),
    "adapter besides": (lambda model: (model / "adapter_config.json").write_text("{}"), ["adapter", "merge"]),
    "hub cache": (emptied("snapshots/0123/config.json", "refs/main"), ["hub cache", "snapshots/0123"]),
    "gguf file": (turned_into_file, ["alpha", "not a folder"]),
    "empty folder": (emptied(), ["config.json", "missing"]),
    "tokenizer cut": (lambda model: (model / "tokenizer.json").write_text('{"version"'), ["tokenizer can't be loaded"]),
    "tokenizer empty": (lambda model: (model / "tokenizer.json").write_text(""), ["tokenizer can't be loaded"]),
    "large token": (with_token("<far>", 300), ["'<far>'", "300", "264 rows"]),
    "no eos": (without_eos, ["no end-of-sequence token"]),
}


@pytest.mark.parametrize(("damage", "expected"), MODELS.values(), ids=MODELS)
def test_models(inputs, refusal, damage, expected):
    damage(inputs / "alpha")
    assert_parts(refusal(), *expected)


@pytest.mark.parametrize("name", ["heads", "tokenizer cut", "q shape", "large token"])
def test_the_last_model_is_checked_before_the_first_runs(inputs, refusal, name):
    damage, _ = MODELS[name]
    damage(inputs / "beta")
    assert "beta" in refusal()


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


def test_two_texts_of_the_same_content(inputs, refusal):
    shutil.copy(inputs / "heldout.jsonl", inputs / "again.jsonl")
    texts = f"{{a: {{path: {inputs / 'heldout.jsonl'}}}, b: {{path: {inputs / 'again.jsonl'}}}}}"
    message = refusal("--set", "evaluation.fidelity.path=null", "--set", f"evaluation.fidelity.texts={texts}")
    assert_parts(message, "evaluation.fidelity.texts: b has the content of another text")


def test_a_chat_template_is_needed_where_it_is_applied(refusal):
    assert_parts(refusal("--set", "evaluation.apply_chat_template=true"), "alpha", "chat template")


def write_chat_template(inputs, template):
    for model in ("alpha", "beta"):
        file = inputs / model / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bad", "TemplateSyntaxError: "),
        ("{{ messages[0].none.none }}", "UndefinedError: "),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "TypeError: "),
    ],
)
def test_a_chat_template_that_cannot_be_rendered(inputs, refusal, template, expected):
    write_chat_template(inputs, template)
    message = refusal("--set", "evaluation.apply_chat_template=true")
    assert_parts(message, f"{inputs / 'alpha'}: the tokenizer's chat template can't be rendered", expected)
    assert_parts(message, "mend it, or set evaluation.apply_chat_template to false")


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        ("{{ bad", []),
        ("{{ bad", ["--set", "evaluation.apply_chat_template=true", "--set", "evaluation.tasks=[]"]),
    ],
)
def test_a_chat_template_that_serves_its_purpose(inputs, tmp_path, template, arguments):
    write_chat_template(inputs, template)
    config = ["--config", str(inputs / "tiny.yaml"), "--out", str(tmp_path / "out")]
    assert sweep.main([*config, "--dry-run", *arguments]) == 0


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
