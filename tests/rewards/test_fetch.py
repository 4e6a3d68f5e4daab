"""Fetching weights from a small hub on this machine."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import close_session, constants

from rewards.fetch import main

ROOT = Path(__file__).parents[2]
HPS = "xswu/HPSv2/HPS_v2.1_compressed.pt"
BERT = "google-bert/bert-base-uncased"
CONTENT = bytes(range(256)) * 40


@dataclass
class Hub:
    """Files by repository and name, as the hub serves them, and what was fetched."""

    files: dict[str, bytes]
    url: str = ""
    gated: bool = False
    fetched: list[str] = field(default_factory=list)
    false_hash: bool = False

    def info(self, repo: str) -> bytes:
        """What the hub says of a repository."""
        siblings = [
            {
                "rfilename": name.removeprefix(repo + "/"),
                "size": len(content),
                "lfs": {"size": len(content), "sha256": self.hash(content), "pointerSize": 1},
            }
            for name, content in self.files.items()
            if name.startswith(repo + "/")
        ]
        return json.dumps({"id": repo, "sha": "0" * 40, "siblings": siblings}).encode()

    def hash(self, content: bytes) -> str:
        return hashlib.sha256(b"other" if self.false_hash else content).hexdigest()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """The hub's headers, and the content where it is asked for."""
        path, get = request.path.partition("?")[0].strip("/"), request.command == "GET"
        content = self.info(path[11:]) if path.startswith("api/models/") else None
        if "/resolve/" in path:
            repo, _, rest = path.partition("/resolve/")
            content = self.files.get(f"{repo}/{rest.partition('/')[2]}")
            self.fetched += [path] if get else []
        if content is None or self.gated:
            request.send_response(404 if content is None else 403)
            request.send_header(
                "X-Error-Code", "EntryNotFound" if content is None else "GatedRepo"
            )
            content = b""
        else:
            request.send_response(200)
            request.send_header("ETag", f'"{self.hash(content)}"')
            request.send_header("X-Repo-Commit", "0" * 40)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content if get else b"")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that answers on this machine."""
    hub = Hub({HPS: CONTENT})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of weights; this process talks to the small hub."""
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    talk_to(hub.url, monkeypatch)
    return tmp_path


def talk_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def fetch(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_a_file_is_announced_checked_and_not_fetched_again(hub: Hub, here: Path) -> None:
    asked = fetch("hps")
    assert asked.exit_code == 1
    assert "Fetch 1 files" in asked.output
    assert "10,240 B, HPS v2.1" in asked.output
    assert hub.fetched == []
    assert not (here / "hps").exists()
    done = fetch("hps", "--yes")
    assert done.exit_code == 0, done.output
    path = here / "hps" / "HPS_v2.1_compressed.pt"
    assert path.read_bytes() == CONTENT
    assert "is there" in fetch("hps", "--yes").output
    assert len(hub.fetched) == 1


def test_another_file_that_comes_is_thrown_away_and_one_in_its_place_left_alone(
    hub: Hub, here: Path
) -> None:
    hub.false_hash = True
    done = fetch("hps", "--yes")
    assert done.exit_code == 1
    assert "what came is another file (SHA-256" in done.output
    assert not list((here / "hps").glob("*.pt"))
    hub.false_hash = False
    for content in (b"mine", CONTENT[::-1]):
        path = here / "hps" / "HPS_v2.1_compressed.pt"
        path.write_bytes(content)
        assert "is another file" in fetch("hps", "--yes").output
        assert path.read_bytes() == content


def test_folders_and_renamed_files_are_fetched(hub: Hub, here: Path) -> None:
    names = ("vocab.txt", "tokenizer_config.json", "tokenizer.json")
    hub.files |= {f"{BERT}/{name}": name.encode() for name in (*names, "model.safetensors")}
    hub.files["trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"] = b"head"
    done = fetch("bert", "aesthetic", "--yes")
    assert done.exit_code == 0, done.output
    assert {n: (here / "bert" / n).read_text() for n in names} == {n: n for n in names}
    assert not (here / "bert" / "model.safetensors").exists()
    assert (here / "aesthetic/sac+logos+ava1-l14-linearMSE.pth").read_bytes() == b"head"


@pytest.mark.usefixtures("here")
def test_what_goes_wrong_is_said_in_a_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, url, gated, words in (
        ("bert", hub.url, False, "has not all of vocab.txt"),
        ("mps", hub.url, False, "mps is not on the hub: get"),
        ("hsp", hub.url, False, "did you mean hps"),
        ("hps", hub.url, True, "accept its licence at"),
        ("hps", "http://127.0.0.1:9", False, "cannot be read"),
    ):
        hub.gated = gated
        talk_to(url, monkeypatch)
        done = fetch(name, "--yes")
        assert done.exit_code == 1
        assert words in done.output
        assert done.output.count("\n") == 1, done.output
