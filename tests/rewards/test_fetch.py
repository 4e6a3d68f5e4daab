"""Fetching weights from a small hub on this machine."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import close_session, constants

from rewards.fetch import main
from rewards.intact import RECORD, recorded

ROOT = Path(__file__).parents[2]
HPS = "/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt"
BERT = "/google-bert/bert-base-uncased/resolve/main/"
CONTENT = bytes(range(256)) * 40


@dataclass
class Hub:
    """Files by their paths, as the hub serves them, and the ranges that were asked for."""

    url: str
    files: dict[str, bytes]
    gated: set[str] = field(default_factory=set)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    false_hash: bool = False


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(None)

        def do_GET(self) -> None:
            if "/resolve/" in self.path:
                hub.asked.append((self.path, self.headers["Range"]))
            content = self.answer(self.headers["Range"])
            self.wfile.write(content)

        def answer(self, part: str | None) -> bytes:
            content = hub.files.get(self.path)
            if content is None or self.path in hub.gated:
                self.send_response(404 if content is None else 403)
                code = "EntryNotFound" if content is None else "GatedRepo"
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return b""
            start = int(part.removeprefix("bytes=").rstrip("-")) if part else 0
            self.send_response(206 if part else 200)
            digest = hashlib.sha256(b"other" if hub.false_hash else content).hexdigest()
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) - start))
            if part:
                span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", span)
            self.end_headers()
            return content[start:]

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub("", {HPS: CONTENT})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """-> the folder of weights; this process talks to the small hub."""
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    talk_to(hub.url, monkeypatch)
    return tmp_path


def talk_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def fetch(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_a_file_comes_through_hf_endpoint(hub: Hub, tmp_path: Path) -> None:
    told = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    told |= {"EPD_WEIGHTS": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "rewards.fetch", "hps", "--yes"],
        cwd=ROOT,
        env={**os.environ, **told},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hps" / "HPS_v2.1_compressed.pt").read_bytes() == CONTENT


def test_a_file_is_told_checked_recorded_and_not_fetched_again(hub: Hub, here: Path) -> None:
    done = fetch("hps", "--yes")
    assert done.exit_code == 0, done.output
    path = here / "hps" / "HPS_v2.1_compressed.pt"
    assert path.read_bytes() == CONTENT
    assert "10,240 B, Apache-2.0" in done.output
    assert sorted(p.name for p in path.parent.iterdir()) == [RECORD, path.name]
    assert recorded(path.parent)[path.name]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert "is there" in fetch("hps", "--yes").output
    assert len(hub.asked) == 1


def test_nothing_is_fetched_without_a_yes(hub: Hub, here: Path) -> None:
    done = fetch("hps")
    assert done.exit_code == 1
    assert "Fetch 1 files" in done.output
    assert hub.asked == []
    assert not (here / "hps").exists()


def test_a_stopped_fetch_goes_on_where_it_was(hub: Hub, here: Path) -> None:
    etag = hashlib.sha256(CONTENT).hexdigest()
    part = here / "hps" / f".HPS_v2.1_compressed.pt.{etag[:12]}.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:4000])
    assert fetch("hps", "--yes").exit_code == 0
    assert hub.asked == [(HPS, "bytes=4000-")]
    assert (part.parent / "HPS_v2.1_compressed.pt").read_bytes() == CONTENT


def test_a_file_with_another_hash_is_thrown_away(hub: Hub, here: Path) -> None:
    hub.false_hash = True
    done = fetch("hps", "--yes")
    assert done.exit_code == 1
    assert "what came has another SHA-256" in done.output
    assert list((here / "hps").iterdir()) == []


def test_another_file_in_its_place_is_left_alone(here: Path) -> None:
    path = here / "hps" / "HPS_v2.1_compressed.pt"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    assert "is another file (4 B, not 10240): move it away" in fetch("hps", "--yes").output
    assert path.read_bytes() == b"mine"


def test_a_folder_of_files_is_fetched(hub: Hub, here: Path) -> None:
    names = ("vocab.txt", "tokenizer_config.json", "tokenizer.json")
    hub.files |= {BERT + name: name.encode() for name in names}
    done = fetch("bert", "--yes")
    assert done.exit_code == 0, done.output
    assert {n: (here / "bert" / n).read_text() for n in names} == {n: n for n in names}


@pytest.mark.usefixtures("here")
def test_what_goes_wrong_is_told_in_a_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = {HPS}
    for name, url, told in (
        ("hps", hub.url, "accept its licence at"),
        ("bert", hub.url, "has not all of vocab.txt"),
        ("mps", hub.url, "mps is not on the hub: get"),
        ("hps", "http://127.0.0.1:9", "cannot be read"),
    ):
        talk_to(url, monkeypatch)
        done = fetch(name, "--yes")
        assert done.exit_code == 1
        assert told in done.output
        assert done.output.count("\n") == 1, done.output
