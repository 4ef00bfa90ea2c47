"""Publishing with the real client and a Hub on loopback, from the command line to the uploaded bytes."""

import errno
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import httpx2
import preloaded
import pytest
from fake_hub import TOKEN, FakeHub
from huggingface_hub.errors import LocalTokenNotFoundError
from support import write
from transformers import GPT2LMHeadModel

from rorchat import hub as rorchat_hub
from rorchat.errors import DataError, PermissionDenied, RemoteError, UsageError
from rorchat.hub import build_model_card
from rorchat.model import build_model, save_model
from rorchat.tokenizer import train_tokenizer

NAME = "owner/small-talk"
TEXTS = ["A dog sleeps in the sun.", "A cat sits on the mat.", "The sun is warm, and the dog is old."]
# The command without verification, which starts two processes and has its own tests
UNVERIFIED = """
import rorchat.hub
rorchat.hub.verify_model = lambda folder: {"answer": "not asked"}
from rorchat.cli import main
main()
"""


@pytest.fixture(scope="session")
def fresh_model(tmp_path_factory) -> Path:
    """The six files of a saved model. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("fresh") / "model"
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    save_model(build_model("2x2x32", tokenizer, n_positions=128), tokenizer, folder)
    return folder


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_run(folder: Path, stage: str, weights: bytes, start: str | None, sources: dict[str, str], loss: float):
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    data = [{"source": s, "licence": licence, "rows_in": 1000, "kept": 987, "rejects": {"too long": 13}}
            for s, licence in sources.items()]  # fmt: skip
    record = {
        "stage": stage, "rorchat": "0.1.0", "parameters": 36224, "device": "cpu", "finished": True,
        "inputs": {"start": {"model.safetensors": start} if start else {"tokenizer.json": "0" * 64}}, "data": data,
        "metrics": {"eval_loss": loss, "eval_bits_per_byte": 1.125, "train_seconds": 7.0, "steps": 1234,
                    "tokens": 5678},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture
def story(tmp_path, fresh_model) -> Path:
    return make_story(tmp_path / "story", fresh_model)


def make_story(folder: Path, fresh_model: Path) -> Path:
    """Three stages. Only the middle one has a complete model; the others have a file of weights."""
    weights = (fresh_model / "model.safetensors").read_bytes()
    shutil.copytree(fresh_model, folder / "sft" / "model")
    write_run(folder / "pretrain", "pretrain", b"first", None, {"tinytown=1000": "Apache-2.0"}, loss=2.719)
    licences = {"alpaca": "CC BY-NC 4.0 (not for commercial use)", "persona": "Apache-2.0"}
    write_run(folder / "sft", "sft", weights, sha256(b"first"), licences, loss=1.618)
    later = {"dailydialog": "CC BY-NC-SA 4.0 (not for commercial use)"}
    write_run(folder / "dpo", "dpo", b"last", sha256(weights), later, loss=0.577)
    return folder


def push(hub: FakeHub, home: Path, folder: Path, *options: str, verified: bool = True, token: str | None = TOKEN):
    """`rorchat push` in another process, because the client reads its settings on import."""
    start = ["-m", "rorchat.cli"] if verified else ["-c", UNVERIFIED]
    return subprocess.run(
        [preloaded.client("python"), *start, "push", str(folder), NAME, *options],
        env=hub.environment(home, token),
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_refused(done: subprocess.CompletedProcess, codes: set[int]) -> str:
    """The single line of output of a command that failed with one of these exit codes."""
    assert done.returncode in codes, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


#: Files that people have in the folder of a model: secrets, data, training state, notes, other forms of the weights.
STRAYS = (
    ".env", ".env.local", ".netrc", ".git/config", ".gitattributes", ".gitignore", ".ssh/id_ed25519",
    "id_rsa.pem", "credentials.json", "token", "token.txt", "hf_token.json", "secrets.yaml", "config.json.bak",
    "config.yaml", "my_customers.jsonl", "chats.csv", "data.parquet", "dataset.arrow", "train.txt",
    "tokens.npy", "notes.md", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt",
    "training_args.bin", "trainer_state.json", "run_state_0.json", "MANIFEST.json", "run.json", "base.json",
    "metrics.jsonl", "samples.jsonl", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.gguf",
    "model.onnx", "ema.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "model.safetensors.part", "global_step4/mp_rank_00_model_states.pt", "checkpoint-5/trainer_state.json",
    "wandb/run-1/config.yaml", "runs/Nov30/events.out.tfevents.1", ".cache/huggingface/token",
    "__pycache__/reward.pyc", "reward.py", "train.ipynb", "train.log", "slurm-123.out", "report.md",
    "curves.png", "photo.jpg", "LICENSE", "model.zip", "Tokenizer.JSON",
)  # fmt: skip


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, fresh_model):
    """A pushed model: the Hub, the finished command, the model's folder."""
    folder = make_story(tmp_path_factory.mktemp("pushed") / "story", fresh_model) / "sft" / "model"
    (folder / "README.md").write_text("an old card")
    for name in STRAYS:
        write(folder, name, "not for others")
    with FakeHub() as hub:
        done = push(hub, tmp_path_factory.mktemp("home"), folder.parent, "--private")
        assert done.returncode == 0, done.stderr
        yield SimpleNamespace(hub=hub, done=done, folder=folder)


def test_push_uploads_exactly_the_models_files_and_a_card(pushed, fresh_model):
    expected = {file.name: file.read_bytes() for file in fresh_model.iterdir()}
    expected["README.md"] = build_model_card(pushed.folder, NAME).encode()
    assert len(expected) == 7 and len(STRAYS) >= 40
    assert pushed.hub.files == {NAME: expected}
    assert not any(b"not for others" in content for content in (*pushed.hub.received, *pushed.hub.lfs.values()))


def test_push_names_what_it_leaves(pushed):
    left = pushed.done.stdout.splitlines()[3].removeprefix("not uploaded, because it is no part of a model: ")
    assert left.split(", ") == sorted({f"{name.partition('/')[0]}{'/' * ('/' in name)}" for name in STRAYS})


def test_push_uploads_the_shards_that_the_index_names(fresh_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(fresh_model, folder)
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    write(folder, "model-00001-of-00009.safetensors", "of an earlier save")
    with FakeHub() as hub:
        assert push(hub, tmp_path / "home", folder, verified=False).returncode == 0
    uploaded = hub.files[NAME].keys()
    assert len(shards) > 1 and {name for name in uploaded if name.endswith(".safetensors")} == shards
    assert "model.safetensors.index.json" in uploaded


def test_an_index_that_names_other_files_is_refused(fresh_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(fresh_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write(folder, "model.safetensors.index.json", json.dumps({"weight_map": {"wte": "../../.ssh/id_ed25519"}}))
    with pytest.raises(DataError, match="no file of weights"):
        rorchat_hub.push(str(folder), NAME, dry_run=True)


def test_a_report_is_uploaded_if_asked_for(story, tmp_path, monkeypatch):
    monkeypatch.setattr(rorchat_hub, "verify_model", lambda folder: {"answer": ""})
    with pytest.raises(DataError, match="write it with rorchat report"):
        rorchat_hub.push(str(story / "sft"), NAME, dry_run=True, report=True)
    for name in ("report.md", "curves.png"):
        write(story, name, "a report")
    listing = rorchat_hub.push(str(story / "sft"), NAME, dry_run=True, report=True)
    assert re.search("^report.md +8 bytes$", listing, re.MULTILINE) and "curves.png" in listing
    assert "report.md" not in rorchat_hub.push(str(story / "sft"), NAME, dry_run=True)


def test_an_adapter_is_refused(fresh_model, tmp_path):
    shutil.copytree(fresh_model, tmp_path / "adapter")
    write(tmp_path / "adapter", "adapter_config.json", "{}")
    with pytest.raises(DataError, match="is an adapter: give the run's model/"):
        rorchat_hub.push(str(tmp_path / "adapter"), NAME)


def test_a_dry_run_lists_what_a_push_uploads_and_needs_no_network(pushed, tmp_path):
    with FakeHub() as hub:
        pass  # it no longer answers
    done = push(hub, tmp_path, pushed.folder, "--dry_run", token=None)
    assert (done.returncode, done.stderr) == (0, "")
    listing, card = done.stdout.split("\nnothing was uploaded; the card (README.md) would be:\n\n")
    sizes = dict(re.findall(r"^(\S+) +([\d,]+) bytes$", listing, re.MULTILINE))
    uploaded = {name: f"{len(content):,}" for name, content in pushed.hub.files[NAME].items()}
    assert sizes == uploaded | {"total": f"{sum(map(len, pushed.hub.files[NAME].values())):,}"}
    assert card.startswith(pushed.hub.files[NAME]["README.md"].decode())
    assert card.endswith("\nnext: the same command without --dry_run\n")


@pytest.mark.parametrize("damage", ["truncate_weights", "remove_stop_token"])
def test_a_dry_run_refuses_what_a_push_refuses(damage, fresh_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(fresh_model, folder)
    globals()[damage](folder)
    with FakeHub() as hub:
        assert_refused(push(hub, tmp_path / "home", folder, "--dry_run"), {65, 78})
        assert hub.requests == []


def test_the_card_does_not_call_files_those_of_the_reader(story):
    record = json.loads((story / "sft" / "run.json").read_text())
    record["data"][0] |= {"source": "messages=/home/me/chats.jsonl", "licence": "that of your files"}
    (story / "sft" / "run.json").write_text(json.dumps(record))
    card = build_model_card(story / "sft" / "model", NAME)
    assert "| sft | messages | the author's own files, licence not stated | 987 of 1,000 | too long 13 |" in card
    assert "your files" not in card and "/home/me" not in card


def test_push_sends_the_weights_and_nothing_else_by_lfs(pushed, fresh_model):
    weights = (fresh_model / "model.safetensors").read_bytes()
    assert pushed.hub.lfs == {sha256(weights): weights}


def test_push_prints_verified_released_verified(pushed):
    lines = pushed.done.stdout.splitlines()
    assert lines[0].startswith(f"verified  {pushed.folder}: ")
    assert lines[1] == f"released  {pushed.hub.url}/{NAME}"
    assert lines[2].startswith("verified  download from the Hub: ")
    assert len(lines) == 4
    assert pushed.done.stderr == ""


def test_push_private_creates_a_private_repository(pushed):
    assert pushed.hub.private == {NAME}


def test_push_downloads_every_file(pushed):
    fetched = {path.split("/", 5)[5] for method, path in pushed.hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == set(pushed.hub.files[NAME])


def test_the_token_is_neither_uploaded_nor_printed(pushed):
    sent = [*pushed.hub.received, *pushed.hub.files[NAME].values(), *pushed.hub.lfs.values()]
    printed = [pushed.done.stdout.encode(), pushed.done.stderr.encode()]
    assert len(sent) > 20
    assert [part for part in sent + printed if TOKEN.encode() in part] == []


def test_a_pushed_model_answers_with_transformers_alone(pushed, tmp_path):
    code = (
        "import json, sys; from transformers import pipeline\n"
        "messages = [{'role': 'user', 'content': 'Who is old?'}]\n"
        "talks = [pipeline('text-generation', model=model) for model in sys.argv[1:]]\n"
        "asked = [talk(messages, do_sample=False, max_new_tokens=8) for talk in talks]\n"
        "print(json.dumps({'asked': asked, 'own': 'rorchat' in sys.modules}))"
    )
    done = subprocess.run(
        [preloaded.client("python"), "-c", code, NAME, str(pushed.folder)],
        env=pushed.hub.environment(tmp_path / "home", token=None),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    from_hub, from_folder = result["asked"]
    assert result["own"] is False
    assert from_hub == from_folder
    assert [message["role"] for message in from_hub[0]["generated_text"]] == ["user", "assistant"]
    assert list((tmp_path / "home").rglob("model.safetensors")) != []  # it came from the Hub


def test_pushing_the_same_model_again_adds_no_commit(pushed, tmp_path):
    before = list(pushed.hub.commits)
    done = push(pushed.hub, tmp_path, pushed.folder, verified=False)
    assert done.returncode == 0, done.stderr
    assert len(before) == 2
    assert pushed.hub.commits == before


def truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def delete_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def remove_stop_token(folder: Path) -> None:
    file = folder / "generation_config.json"
    config = json.loads(file.read_text())
    assert len(config["eos_token_id"]) == 2
    file.write_text(json.dumps(config | {"eos_token_id": config["bos_token_id"]}))


@pytest.mark.parametrize("damage", [truncate_weights, delete_chat_template, remove_stop_token])
def test_a_model_that_cannot_chat_is_refused_before_anything_is_uploaded(damage, fresh_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(fresh_model, folder)
    damage(folder)
    with FakeHub() as hub:
        line = assert_refused(push(hub, tmp_path / "home", folder), {65, 78})
        assert hub.requests == []
    assert str(folder) in line
    assert ("<|im_end|>" in line) == (damage is remove_stop_token)


def test_pickled_weights_are_refused(fresh_model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(fresh_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setattr(rorchat_hub, "verify_model", lambda folder: {"answer": ""})
    with pytest.raises(DataError, match="safetensors"):
        rorchat_hub.push(str(folder), NAME)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="No model folder"):
        rorchat_hub.push(str(tmp_path / "nowhere"), NAME)


@pytest.mark.parametrize("name", ["owner/two words", "owner/-name", "owner/name.git", "a/b/c"])
def test_an_invalid_repository_name_is_a_usage_error(name, fresh_model):
    with pytest.raises(UsageError, match="not a valid name of a Hub repository"):
        rorchat_hub.push(str(fresh_model), name)


def test_a_model_that_loads_too_slowly_is_refused(fresh_model, monkeypatch):
    monkeypatch.setattr(rorchat_hub, "VERIFY_SECONDS", 0.01)
    with pytest.raises(DataError, match=r"within 0\.01 s"):
        rorchat_hub.verify_model(fresh_model)


@pytest.mark.parametrize(
    ("request_pattern", "status", "code"),
    [
        ("POST /api/repos/create", 403, 77),  # somebody else's name
        ("PUT /lfs/", 403, 77),  # fails in a thread of the client, which wraps it
        ("POST .*/commit/main", 500, 76),
    ],
)
def test_an_error_of_the_hub_is_one_line_with_an_exit_code(request_pattern, status, code, fresh_model, tmp_path):
    with FakeHub() as hub:
        hub.failing[request_pattern] = status
        line = assert_refused(push(hub, tmp_path, fresh_model, verified=False), {code})
    assert NAME in line
    assert f"{status}, fake failure {status}" in line
    assert TOKEN not in line


def test_push_without_login_explains_how_to_log_in(fresh_model, tmp_path):
    with FakeHub() as hub:
        line = assert_refused(push(hub, tmp_path, fresh_model, verified=False, token=None), {77})
        assert hub.files == {}
    assert "hf auth login" in line


def test_an_unreachable_hub_is_one_line(fresh_model, tmp_path):
    with FakeHub() as hub:
        gone = hub
    assert "refused" in assert_refused(push(gone, tmp_path, fresh_model, verified=False), {76})


def test_a_changed_download_is_not_released(fresh_model, tmp_path):
    weights = (fresh_model / "model.safetensors").read_bytes()
    with FakeHub() as hub:
        hub.changed["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
        line = assert_refused(push(hub, tmp_path, fresh_model, verified=False), {76})
        assert len(hub.commits) == 2
        assert hub.private == set()
    assert "model.safetensors" in line


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("other")])
def test_every_file_of_a_model_is_compared(damage, tmp_path):
    for folder in ("here", "there"):
        write(tmp_path / folder, "chat_template.jinja", "same")
    rorchat_hub.compare_files(tmp_path / "here", tmp_path / "there", NAME)
    damage(tmp_path / "there" / "chat_template.jinja")
    with pytest.raises(RemoteError, match="chat_template.jinja"):
        rorchat_hub.compare_files(tmp_path / "here", tmp_path / "there", NAME)


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (httpx2.ConnectError("no route"), RemoteError),
        (httpx2.ReadTimeout("too slow"), RemoteError),
        (ConnectionResetError(errno.ECONNRESET, "reset"), RemoteError),
        (OSError("Consistency check failed"), RemoteError),
        (RuntimeError("Xet: CAS service error"), RemoteError),
        (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."), RemoteError),
        (LocalTokenNotFoundError("no token"), PermissionDenied),
        (PermissionError("the Hub's answer to Xet"), PermissionDenied),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (FileNotFoundError(errno.ENOENT, "gone", "config.json"), FileNotFoundError),
        (PermissionError(errno.EACCES, "not yours", "config.json"), PermissionError),
        (KeyError("a bug of ours"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=repr,
)
def test_only_remote_errors_are_translated(raised, becomes):
    with pytest.raises(BaseException) as caught, rorchat_hub.translate_hub_errors(NAME):
        raise raised
    assert caught.type is becomes


def test_a_wrapped_error_is_judged_by_its_cause():
    with pytest.raises(RemoteError, match="no route"), rorchat_hub.translate_hub_errors(NAME):
        raise RuntimeError("Error while uploading") from httpx2.ConnectError("no route")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RuntimeError), rorchat_hub.translate_hub_errors(NAME):
        raise RuntimeError("Error while downloading") from full


def test_the_card_names_sources_licences_and_numbers(story):
    lines = build_model_card(story / "sft" / "model", NAME).splitlines()
    assert "| pretrain | tinytown | Apache-2.0 | 987 of 1,000 | too long 13 |" in lines
    licence = "CC BY-NC 4.0 (not for commercial use)"
    assert f"| sft | alpaca | {licence} | 987 of 1,000 | too long 13 |" in lines
    assert "| sft | 36,224 | 1,234 | 5,678 | 7 | - | 1.618 nats/token | 1.125 | cpu |" in lines
    assert "| pretrain | 36,224 | 1,234 | 5,678 | 7 | - | 2.719 nats/token | 1.125 | cpu |" in lines
    assert f"**Not for commercial use**, because of its data: alpaca ({licence})." in lines


def test_the_card_omits_later_stages(story):
    card = build_model_card(story / "sft" / "model", NAME)
    assert "dailydialog" not in card
    assert "0.577" not in card
    assert "dailydialog" not in build_model_card(story / "pretrain" / "model", NAME)
    assert "Not for commercial use" not in build_model_card(story / "pretrain" / "model", NAME)


def test_the_card_of_a_copied_model_names_its_runs(story):
    shutil.copytree(story / "sft" / "model", story / "model")
    assert build_model_card(story / "model", NAME) == build_model_card(story / "sft" / "model", NAME)


def test_a_card_names_every_source_if_a_run_is_missing(story):
    (story / "pretrain" / "model" / "model.safetensors").unlink()
    card = build_model_card(story / "sft" / "model", NAME)
    assert [source in card for source in ("tinytown", "alpaca", "persona", "dailydialog")] == [True] * 4
    assert "=" not in card.split("## Data")[1].split("##")[0]  # no local path of the training machine


def test_a_card_names_every_source_if_a_run_started_from_an_adapter(story):
    record = json.loads((story / "sft" / "run.json").read_text())
    record["inputs"]["start"] = {"adapter_model.safetensors": "0" * 64}
    (story / "sft" / "run.json").write_text(json.dumps(record))
    assert "tinytown" in build_model_card(story / "sft" / "model", NAME)


def test_the_card_of_a_model_without_runs_says_so(fresh_model):
    card = build_model_card(fresh_model, NAME)
    assert card.endswith("There is no record of its training.\n")
    assert "Not for commercial use" not in card
    assert f'model="{NAME}"' in card
