"""Names, downloads and the shared cache, against a hub of our own on loopback that cuts, lies and redirects."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, FakeHub, git_sha1, hub_running
from moe_edge.models.errors import BadChecksum, BadFile, DiskFull, MissingFile, UsageError
from moe_edge.runner.hub.client import Hub, HubError
from moe_edge.runner.hub.download import Download
from moe_edge.runner.hub.hub_cache import cache_folder, find_stored, repo_folder, stored_models
from moe_edge.runner.hub.names import HubName, RemoteFile, choose, hub_name, matches, model_files, parts_of, quant_of
from moe_edge.runner.hub.pull import best_choice, fetch, find_choice, other_choices, plan_choice, resolve_model
from random_models import Shape, write_random_model

START = [sys.executable, "-m", "moe_edge.runner.start"]
REPO = "user/model-GGUF"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LLAMA_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "HF_TOKEN", "MODEL_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_random_model(tmp_path_factory.mktemp("m") / "m.gguf", "qwen3moe").read_bytes()


@pytest.fixture
def hub(model: bytes) -> Iterator[FakeHub]:
    noise = random.Random(1).randbytes(3 * MIB + 12345)
    files = {"README.md": b"# hi\n", "m-Q8_0.gguf": model, "big-BF16.gguf": noise, "mmproj-F16.gguf": b"x" * 10}
    with hub_running(FakeHub(REPO, files)) as running:
        yield running


def client(hub: FakeHub, token: str = "") -> Hub:
    return Hub(hub.url, token, pause=0.01)


def download(hub: FakeHub, path: str, tmp_path: Path, chunk: int = 1 << 18) -> tuple[Download, bytes]:
    talk = client(hub)
    repo = talk.repository(REPO)
    file = next(each for each in repo.files if each.path == path)
    made = Download(talk, repo, file, tmp_path / "blobs" / file.blob, chunk)
    return made, made.run().read_bytes()


# ---- names


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1, path) for path in paths]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/repo", HubName("user/repo")), ("user/re.po-GGUF:Q4_K_M", HubName("user/re.po-GGUF", "Q4_K_M")),
        ("hf.co/user/repo:q8_0", HubName("user/repo", "q8_0")),
        ("https://huggingface.co/user/repo", HubName("user/repo")), ("user/repo.gguf", None), ("repo", None),
        ("/user/repo", None), ("./user/repo", None), ("a/b/c", None), ("user/repo:", None), ("../x", None),
    ],
)  # fmt: skip
def test_what_is_a_name_of_the_hub(text: str, expected: HubName | None) -> None:
    assert hub_name(text) == expected


def test_a_path_that_is_there_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("user/repo") is not None
    (tmp_path / "user" / "repo").mkdir(parents=True)
    assert hub_name("user/repo") is None


def test_a_tag_begins_where_a_word_begins_and_the_shortest_path_wins() -> None:
    assert matches("m-BF16.gguf", "BF16") and not matches("m-BF16.gguf", "F16")
    assert matches("Q4_K_M/m-00001-of-00002.gguf", "q4_k_m") and not matches("m-IQ4_K_M.gguf", "Q4_K_M")
    assert not matches("m-Q4_K_M.gguf", "Q4_K")
    there = files("x/long-Q4_K_M.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-F16.gguf", "m.imatrix.gguf", "a.txt")
    assert [each.path for each in model_files(there)] == ["x/long-Q4_K_M.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"]
    assert choose(there, HubName("r", "Q8_0")).path == "m-Q8_0.gguf"
    assert choose(there, HubName("r")).path == "m-Q4_K_M.gguf"
    assert choose(files("b-Q2_K.gguf", "a-Q3_K.gguf"), HubName("r")).path == "b-Q2_K.gguf"
    assert choose(files("b-Q2_K.gguf", "a-q8_0.gguf"), HubName("r")).path == "a-q8_0.gguf"
    with pytest.raises(UsageError, match="has no F16; it has Q4_K_M, Q8_0"):
        choose(there, HubName("user/r", "F16"))
    with pytest.raises(UsageError, match="no GGUF model"):
        choose(files("model.safetensors"), HubName("user/r"))


def test_split_models_are_whole_or_refused() -> None:
    there = files(*(f"q/m-0000{n}-of-0000{of}.gguf" for n, of in ((1, 3), (3, 3), (2, 3), (1, 2))))
    first = model_files(there)[0]
    assert [each.path[-15] for each in parts_of(first, there)] == ["1", "2", "3"]
    with pytest.raises(BadFile, match="m-00002-of-00002"):
        parts_of(there[3], there)


def test_quants_are_read_off_names() -> None:
    names = {"Qwen3-30B-A3B-Q4_K_M.gguf": "Q4_K_M", "m-UD-Q2_K_XL.gguf": "UD-Q2_K_XL", "m.IQ4_XS.gguf": "IQ4_XS",
             "m-BF16-00001-of-00002.gguf": "BF16", "gpt-oss-MXFP4.gguf": "MXFP4", "plain.gguf": ""}  # fmt: skip
    assert {name: quant_of(name) for name in names} == names


# ---- downloads


def test_a_file_comes_whole_in_ranges_and_small_ones_by_gits_checksum(hub: FakeHub, tmp_path: Path) -> None:
    _, data = download(hub, "big-BF16.gguf", tmp_path)
    assert data == hub.files["big-BF16.gguf"]
    assert sum(1 for method, path, _ in hub.requests if "/cdn/" in path and method == "GET") >= 12
    made, data = download(hub, "README.md", tmp_path)
    assert data == b"# hi\n" and made.blob.name == git_sha1(b"# hi\n")
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == sorted(
        [made.blob.name, next(p.name for p in (tmp_path / "blobs").iterdir() if len(p.name) == 64)]
    )


def test_connections_that_break_go_on_where_they_broke(hub: FakeHub, tmp_path: Path) -> None:
    rng = random.Random(2)
    hub.cut = lambda path, n: rng.randrange(1, 100_000) if n % 3 else None
    _, data = download(hub, "big-BF16.gguf", tmp_path)
    assert data == hub.files["big-BF16.gguf"]
    assert hub.sent < 1.3 * len(data)


def test_a_connection_that_never_brings_a_byte_ends_with_a_sentence(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_edge.runner.hub.download.TRIES", 3)
    hub.cut = lambda path, n: 0
    with pytest.raises(HubError, match="big-BF16"):
        download(hub, "big-BF16.gguf", tmp_path, chunk=1 << 22)


def test_a_server_without_ranges_works_too(hub: FakeHub, tmp_path: Path) -> None:
    hub.ignore_ranges = True
    _, data = download(hub, "big-BF16.gguf", tmp_path)
    assert data == hub.files["big-BF16.gguf"]


def test_expired_addresses_are_asked_for_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.expire = 2
    _, data = download(hub, "big-BF16.gguf", tmp_path)
    assert data == hub.files["big-BF16.gguf"]


def test_what_is_not_what_the_hub_says_is_thrown_away(hub: FakeHub, tmp_path: Path) -> None:
    hub.other_sha256["big-BF16.gguf"] = "a" * 64
    with pytest.raises(BadChecksum, match="thrown away: pull again"):
        download(hub, "big-BF16.gguf", tmp_path)
    assert not [path for path in (tmp_path / "blobs").iterdir() if "part" in path.name or "json" in path.name]


def test_a_full_disk_is_known_before_anything_is_written(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    before = hub.sent
    with pytest.raises(DiskFull, match="needs 3158073 bytes"):
        download(hub, "big-BF16.gguf", tmp_path)
    assert hub.sent == before and not list((tmp_path / "blobs").glob("*.part"))


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub: FakeHub, tmp_path: Path) -> None:
    hub.token = "secret"
    with pytest.raises(UsageError, match="wants a token"):
        client(hub).repository(REPO)
    talk = client(hub, "secret")
    repo = talk.repository(REPO)
    file = next(each for each in repo.files if each.path == "m-Q8_0.gguf")
    Download(talk, repo, file, tmp_path / "b").run()
    for _, path, headers in hub.requests:
        assert ("Authorization" in headers) == (not path.startswith("localhost")) or "cdn" not in path
    assert any(path.startswith("localhost") for _, path, _ in hub.requests)


def test_a_hub_that_fails_for_a_moment_is_asked_again_and_one_that_is_not_there_is_named(hub: FakeHub) -> None:
    hub.fail = 3
    assert client(hub).repository(REPO).commit == COMMIT
    with pytest.raises(MissingFile, match="user/other"):
        client(hub).repository("user/other")
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 cannot be reached"):
        Hub("http://127.0.0.1:9", "", pause=0.001).repository(REPO)


def test_a_damaged_journal_begins_anew(hub: FakeHub, tmp_path: Path) -> None:
    made, data = download(hub, "big-BF16.gguf", tmp_path)
    made.blob.rename(made.part)
    for text in ("{", "[]", '{"version": 1, "done": [0]}', '{"done": "x"}'):
        made.journal.write_text(text)
        again, found = download(hub, "big-BF16.gguf", tmp_path)
        assert found == data
        again.blob.rename(made.part)


def test_pulls_of_one_file_at_once_fetch_it_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.slow = 0.01
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(download(hub, "big-BF16.gguf", tmp_path)[1])) for _ in range(3)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert found == [hub.files["big-BF16.gguf"]] * 3
    assert hub.sent < 1.5 * len(found[0])


# ---- the program


def run(hub: FakeHub, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, **more}
    return subprocess.run([*START, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_pull_plans_brings_and_names_a_model_that_others_find(hub: FakeHub) -> None:
    planned = run(hub, "pull", f"{REPO}:Q8_0", "--plan-only", "--ram", "64MiB")
    assert planned.returncode == 0 and "m-Q8_0" not in planned.stdout, planned.stderr
    assert not list(cache_folder().glob("models--*")) and hub.sent < len(hub.files["m-Q8_0.gguf"]) + 4 * MIB
    done = run(hub, "pull", f"{REPO}:Q8_0", "--ram", "64MiB")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == hub.files["m-Q8_0.gguf"] and path.is_symlink()
    assert (repo_folder(REPO) / "refs" / "main").read_text() == COMMIT
    from huggingface_hub import hf_hub_download

    assert hf_hub_download(REPO, "m-Q8_0.gguf", local_files_only=True, cache_dir=cache_folder()) == str(path)
    # the same name wherever a model is given, without the network
    said = run(hub, "generate", f"{REPO}:Q8_0", "-p", "ab", "-n", "2", "--temp", "0", HF_ENDPOINT="http://127.0.0.1:9")
    assert said.returncode == 0, said.stderr
    listed = json.loads(run(hub, "ls", "--json").stdout)
    assert [each["name"] for each in listed] == [f"{REPO}:Q8_0"]
    assert run(hub, "rm", f"{REPO}:Q8_0").returncode == 2
    assert run(hub, "rm", f"{REPO}:Q8_0", "--yes").returncode == 0
    assert not repo_folder(REPO).exists() and "no model in" in run(hub, "ls").stdout


def test_what_huggingface_hub_has_fetched_is_not_fetched_again(hub: FakeHub) -> None:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(REPO, "m-Q8_0.gguf", endpoint=hub.url, cache_dir=cache_folder())
    assert find_stored(HubName(REPO, "Q8_0")) == Path(path)
    before = hub.sent
    talk = client(hub)
    assert fetch(talk, find_choice(talk, HubName(REPO, "Q8_0"))) == Path(path)
    assert hub.sent == before


def test_a_model_that_is_not_here_is_asked_about_or_refused_with_the_command(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    told: list[str] = []
    with pytest.raises(UsageError, match=f"moe-edge pull {REPO}:Q8_0"):
        resolve_model(f"{REPO}:Q8_0", None, told.append)
    with pytest.raises(UsageError, match="is not here"):
        resolve_model(f"{REPO}:Q8_0", lambda question: False, told.append)
    questions: list[str] = []

    def yes(question: str) -> bool:
        questions.append(question)
        return True

    path = resolve_model(f"{REPO}:Q8_0", yes, told.append)
    assert Path(path).read_bytes() == hub.files["m-Q8_0.gguf"] and f"{REPO}:Q8_0" in questions[0]
    assert resolve_model("x.gguf", None, told.append) == "x.gguf"
    refused = run(hub, "show", "user/none:Q8_0")
    assert refused.returncode == 2 and "moe-edge pull user/none:Q8_0" in refused.stderr


def test_split_models_are_planned_from_their_headers_and_brought_whole(tmp_path: Path) -> None:
    first = write_random_model(tmp_path / "s.gguf", "qwen3moe", split=True)
    there = {f"q8/{path.name}": path.read_bytes() for path in sorted(first.parent.glob("s-*.gguf"))}
    with hub_running(FakeHub(REPO, there)) as hub:
        talk = client(hub)
        choice = find_choice(talk, HubName(REPO))
        assert len(choice.files) == 2
        assert plan_choice(talk, choice, ram_bytes=64 * MIB).will_run
        path = fetch(talk, choice)
        assert path == repo_folder(REPO) / "snapshots" / COMMIT / choice.files[0].path
        (stored,) = stored_models()
        assert stored.nbytes == sum(map(len, there.values())) and len(stored.files) == 2
        shown = run(hub, "show", REPO, "--json")
        assert shown.returncode == 0, shown.stderr


def test_what_will_not_run_is_not_downloaded_and_the_best_of_a_repository_is_found(tmp_path: Path) -> None:
    large = write_random_model(tmp_path / "l.gguf", "qwen3moe", Shape(n_embd=256, n_vocab=60000)).read_bytes()
    small = write_random_model(tmp_path / "s.gguf", "qwen3moe").read_bytes()
    with hub_running(FakeHub(REPO, {"a-Q8_0.gguf": large, "a-Q4_K_M.gguf": small})) as hub:
        refused = run(hub, "pull", f"{REPO}:Q8_0", "--ram", "20MiB")
        assert refused.returncode == 1 and "WILL NOT RUN" in refused.stderr and "--best" in refused.stderr
        assert not repo_folder(REPO).exists()
        talk = client(hub)
        choice = find_choice(talk, HubName(REPO, "Q8_0"))
        told: list[str] = []
        found = best_choice(talk, other_choices(choice), told.append, ram_bytes=40 * MIB)
        assert found is not None and found[0].files[0].path == "a-Q4_K_M.gguf" and len(told) == 2
        assert best_choice(talk, other_choices(choice), told.append, ram_bytes=MIB) is None


def test_a_shared_blob_stays_while_another_model_needs_it(hub: FakeHub) -> None:
    hub.files["copy-Q8_0.gguf"] = hub.files["m-Q8_0.gguf"]
    talk = client(hub)
    first = fetch(talk, find_choice(talk, HubName(REPO, "Q8_0")))
    other = first.with_name("copy-Q4_0.gguf")
    other.symlink_to(first.readlink())
    assert run(hub, "rm", f"{REPO}:Q8_0", "--yes").returncode == 0
    assert other.read_bytes() == hub.files["m-Q8_0.gguf"] and not first.exists()


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_kills_at_any_moment_lose_no_finished_range(tmp_path: Path) -> None:
    """SIGKILL at random moments: each run goes on, the file is right, and little is fetched twice."""
    rng, data = random.Random(4), random.Random(5).randbytes(12 * MIB)
    code = (
        "import sys; from pathlib import Path; from moe_edge.runner.hub.client import Hub\n"
        "from moe_edge.runner.hub.download import Download\n"
        "hub = Hub(sys.argv[1], ''); repo = hub.repository(sys.argv[2])\n"
        "Download(hub, repo, repo.files[0], Path(sys.argv[3]), 1 << 20).run(connections=2)\n"
    )
    blob = tmp_path / "blob"
    with hub_running(FakeHub(REPO, {"x-Q8_0.gguf": data}, slow=0.004)) as hub:
        kills = 0
        while not blob.exists():
            child = subprocess.Popen([sys.executable, "-c", code, hub.url, REPO, str(blob)])
            if kills < 12:
                before = hub.sent
                wait_until(lambda before=before, child=child: hub.sent > before or child.poll() is not None)  # type: ignore[misc]
                time.sleep(rng.random() * 0.15)
                child.send_signal(signal.SIGKILL)
                kills += 1
            child.wait(60)
        assert blob.read_bytes() == data
        assert hub.sent < len(data) + kills * 2 * MIB + kills * MIB
    assert kills >= 3 and not blob.with_name("blob.moe-edge.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_has_come_and_says_how_to_go_on(hub: FakeHub, number: int) -> None:
    hub.files["m-Q8_0.gguf"] = hub.files["m-Q8_0.gguf"] + bytes(40 * MIB)
    hub.slow = 0.02
    environment = {**os.environ, "HF_ENDPOINT": hub.url}
    child = subprocess.Popen(
        [*START, "pull", f"{REPO}:Q8_0", "--ram", "64MiB"], stderr=subprocess.PIPE, text=True, env=environment
    )
    wait_until(lambda: bool(list(cache_folder().glob("models--*/blobs/*.part"))))
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + number, said
    assert "Traceback" not in said
    if number == signal.SIGINT:
        assert f"moe-edge pull {REPO}:Q8_0 goes on from there" in said
    assert list(cache_folder().glob("models--*/blobs/*.part"))
