"""Pushing a named checkpoint, to a hub on this machine or to none: nothing here reaches a network."""

import json
from types import SimpleNamespace

import pytest
from hfprune_launch import publish
from hub import TOKEN, Repository, local_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from sweeps import in_process

CARD = "---\nlicense: mit\nbase_model: org/base\n---\n# name\n"


@pytest.fixture
def out(tmp_path):
    """A sweep's folder with one checkpoint, whose weights are a link into the store."""
    artifact, folder = tmp_path / "store" / "recover" / "a", tmp_path / "checkpoints" / "name"
    for path in (artifact, folder / "adapter"):
        path.mkdir(parents=True)
    (artifact / "model.safetensors").write_text("x" * 1000)
    (folder / "model.safetensors").symlink_to("../../store/recover/a/model.safetensors")
    (folder / "README.md").write_text(CARD)
    (folder / "adapter" / "adapter_model.safetensors").symlink_to("../../../store/recover/a/model.safetensors")
    of_adapter(tmp_path, "./runs/x/store/prune/a")
    return tmp_path


def of_adapter(out, base):
    config = {"base_model_name_or_path": base}
    (out / "checkpoints" / "name" / "adapter" / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def pushed(monkeypatch):
    """Record what would have reached the hub: the repository's options, and sizes by file."""
    calls = {}

    def create_commit(self, repo_id, operations, **_):
        calls["files"] = {it.path_in_repo: it.upload_info.size for it in operations if hasattr(it, "upload_info")}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}", oid="0", pr_url=None)

    def create_repo(self, repo_id, **options):
        calls[repo_id] = options
        return SimpleNamespace(repo_id=repo_id)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "model_info", lambda _, repo_id: SimpleNamespace(private=repo_id != "me/public"))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    # These would ask the hub before anything is pushed.
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    return calls


def run(out, *arguments):
    return in_process(publish.main, out, *arguments)


def test_links_are_pushed_as_files_and_an_adapter_without_a_public_base_stays(out, pushed):
    code, shown, _ = run(out, "name", "me/it", "--private")
    assert code == 0 and "https://hub/me/it" in shown and "adapter/ stays here" in shown
    assert pushed["files"] == {"README.md": len(CARD), "model.safetensors": 1000}
    assert pushed["me/it"] == {"private": True, "exist_ok": True}
    of_adapter(out, "org/base")
    assert run(out, "name", "me/it")[0] == 0 and pushed["me/it"]["private"] is None
    assert set(pushed["files"]) == {
        "README.md",
        "model.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }


def test_a_checkpoint_is_pushed_even_if_nobody_reads_what_is_said_of_it(out, pushed, unread):
    with unread:
        assert publish.main([str(out), "name", "me/it"]) == 0
    assert "model.safetensors" in pushed["files"]


@pytest.mark.parametrize("base", ["./store/a", "../a", "/home/me/runs/x/store/prune/a", "~/models/a", "", None])
def test_an_adapter_whose_base_is_a_folder_stays_however_its_user_has_written_that(out, pushed, base):
    of_adapter(out, base)
    code, shown, _ = run(out, "name", "me/it")
    assert code == 0 and "adapter/ stays here" in shown and set(pushed["files"]) == {"README.md", "model.safetensors"}


def test_what_is_to_be_private_is_not_pushed_where_everybody_can_read(out, pushed):
    code, _, said = run(out, "name", "me/public", "--private")
    assert code == 2 and "me/public already exists and is public" in said and "files" not in pushed
    assert run(out, "name", "me/public")[0] == 0 and "files" in pushed


def test_a_dry_run_shows_the_same_files_and_pushes_nothing(out, pushed):
    (out / "checkpoints" / "name" / "README.md").write_text("---\nlanguage: en\n---\n")
    code, shown, _ = run(out, "name", "me/it", "--dry-run")
    assert code == 0 and pushed == {}
    assert "1,000 bytes  model.safetensors" in shown and "adapter_model" not in shown
    assert "would be pushed to me/it: 1,021 bytes in 2 files" in shown
    assert "doesn't name a licence (license) or the base model's id (base_model)" in shown


@pytest.mark.parametrize("kept", [".git/config", "adapter/.git/config", ".cache/huggingface/upload/x.metadata"])
def test_what_the_client_keeps_to_itself_is_neither_pushed_nor_shown(out, pushed, kept):
    """A user may have cloned a repository there, or have uploaded the folder by other means."""
    file = out / "checkpoints" / "name" / kept
    file.parent.mkdir(parents=True)
    file.write_text("secret")
    of_adapter(out, "org/base")
    _, told, _ = run(out, "name", "me/it", "--dry-run")
    code, shown, _ = run(out, "name", "me/it")
    assert code == 0 and len(pushed["files"]) == 4
    assert [line.split()[-1] for line in told.splitlines() if " bytes  " in line] == sorted(pushed["files"])
    assert f"in {len(pushed['files'])} files" in told and f"in {len(pushed['files'])} files" in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nam", "me/it"], "did you mean 'name'?; valid: name"),
        (["../store", "me/it"], "no checkpoint"),
        (["name", "not a name"], "can't be a repository"),
        (["name", "a/b/c"], "can't be a repository"),
    ],
)
def test_bad_input_is_one_message(out, pushed, arguments, complaint):
    code, _, said = run(out, *arguments)
    assert code == 2 and complaint in said and "Traceback" not in said and pushed == {}


def test_what_is_not_whole_is_not_pushed(out, pushed):
    card = out / "checkpoints" / "name" / "README.md"
    for content in ("---\n: [\n---\n", "---\nmodel-index: 3\n---\n"):
        card.write_text(content)
        code, _, said = run(out, "name", "me/it")
        assert code == 2 and "no card that the hub can read" in said
    card.write_text(CARD)
    (out / "store" / "recover" / "a" / "model.safetensors").unlink()
    code, _, said = run(out, "name", "me/it")
    assert code == 2 and "is gone" in said and pushed == {}


def test_a_folder_that_lacks_a_file_of_its_artifact_is_not_pushed(out, pushed):
    manifest = {"files": {"config.json": {}, "model.safetensors": {}}}
    (out / "store" / "recover" / "a" / "manifest.json").write_text(json.dumps(manifest))
    code, _, said = run(out, "name", "me/it", "--dry-run")
    assert code == 2 and "config.json is missing" in said and pushed == {}


def test_a_hub_that_refuses_is_one_message(out, monkeypatch):
    for error in (LocalTokenNotFoundError("Token is required"), without_network()):

        def refuse(*_, error=error, **__):
            raise error

        monkeypatch.setattr(HfApi, "create_repo", refuse)
        code, _, said = run(out, "name", "me/it")
        assert code == 2 and "hf auth login" in said and str(error) in said


def without_network():
    """Return the error that is raised where there is no network."""
    return HfHubHTTPError.__bases__[0]("Name or service not known")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with local_hub() as hub:
        settings = {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


@pytest.mark.parametrize("named", ["me/it", "it"])
def test_what_arrives_at_a_hub_is_the_folder(out, hub, named):
    """Whoever gives no owner means their own account."""
    code, shown, said = run(out, "name", named, "--private")
    assert code == 0, said
    assert f"{hub.endpoint}/me/it/commit/{1:040x}" in shown
    assert hub.repositories == {
        "me/it": Repository(True, {"README.md": CARD.encode(), "model.safetensors": b"x" * 1000}, ["Add name"])
    }
    (out / "checkpoints" / "name" / "README.md").write_text(CARD + "more\n")
    assert run(out, "name", named)[0] == 0
    again = hub.repositories["me/it"]
    assert again.private and again.files["README.md"] == f"{CARD}more\n".encode() and len(again.commits) == 2


def test_a_hub_gets_nothing_that_it_or_the_user_refuses(out, hub, monkeypatch):
    hub.repositories["me/public"] = Repository(False)
    code, _, said = run(out, "name", "me/public", "--private")
    assert code == 2 and "already exists and is public" in said
    for named, broken in (("another/it", "^$"), ("me/public", "/commit/")):
        hub.broken = broken
        code, _, said = run(out, "name", named)
        assert code == 2 and "the hub refused" in said and "Traceback" not in said
    monkeypatch.setenv("HF_TOKEN", "another")
    code, _, said = run(out, "name", "me/new")
    assert code == 2 and "hf auth login" in said and hub.repositories == {"me/public": Repository(False)}
