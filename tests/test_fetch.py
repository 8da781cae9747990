"""Fetching: resumed where it broke off, checked, taken from a folder by hand, refused in one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from commands import write_params
from pipestill import artifacts, cli, digests, download
from pipestill.config import FetchParams
from pipestill.errors import InputError, Stopped, SurroundingsError
from pipestill.stages.fetch import fetch, missing
from pipestill.stopping import StopRequest
from pipestill.work import Work

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several blocks
SHA = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """What the server has and how it behaves; `seen` are the requests' methods, ranges and authorisations."""

    address: str = ""
    content: bytes = CONTENT
    tag: str = '"one"'
    break_after: list[int] = field(default_factory=list)  # bytes to send before breaking off, request by request
    statuses: list[int] = field(default_factory=list)  # statuses to answer before anything else
    ranges: bool = True
    token: str = ""  # needed where it is set
    heedless: bool = False  # gives parts of whatever it has, without regard to If-Range
    short: int = 0  # bytes that each answer has at most, said as its length
    extra: dict[str, str] = field(default_factory=dict)  # further headers
    silent: bool = False  # says no length
    seen: list[tuple[str, str, str]] = field(default_factory=list)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            self.answer(head=False)

        def answer(self, *, head: bool) -> None:
            asked, authorised = self.headers.get("Range", ""), self.headers.get("Authorization", "")
            if self.path.endswith("net.pkl") or self.path == "/x":  # the hub's library asks for other things too
                site.seen.append((self.command, asked, authorised))
            status = site.statuses.pop(0) if site.statuses else 200
            if site.token and authorised != f"Bearer {site.token}":
                status = 401
            first = 0
            same = site.heedless or self.headers.get("If-Range", site.tag) == site.tag
            if status == 200 and asked and site.ranges and same:
                first = int(asked.removeprefix("bytes=").split("-")[0])
                status = 206 if first < len(site.content) else 416
            body = site.content[first:] if status in (200, 206) else b""
            if status == 206 and site.short:
                body = body[: site.short]
            self.send_response(status)
            if site.tag:
                self.send_header("ETag", site.tag)
            for name, value in site.extra.items():
                self.send_header(name, value)
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 401:
                self.send_header("X-Error-Code", "RepoNotFound")
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{len(site.content) - 1}/{len(site.content)}")
            if status == 416:
                self.send_header("Content-Range", f"bytes */{len(site.content)}")
            if site.silent:
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if head:
                return
            if site.break_after:
                self.wfile.write(body[: site.break_after.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


def params(site: Site, **changes: Any) -> FetchParams:
    file = {
        "path": "net.pkl",
        "source": "https",
        "location": f"{site.address}/net.pkl",
        "sha256": SHA,
        "size": len(CONTENT),
    }
    return FetchParams.model_validate({"files": [file | changes], "licence": "test"})


def fetched(entry: FetchParams) -> bytes:
    artifact = fetch(entry, Path("out"), inbox=Path("inputs/net"))
    assert artifact.manifest.kind == "files"
    assert list(artifact.manifest.files) == ["LICENCE", "net.pkl"]
    artifacts.verify(artifact)
    return artifact.file("net.pkl").read_bytes()


def test_a_file_is_fetched_once(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetched(params(site)) == CONTENT
    requests = len(site.seen)
    assert fetched(params(site)) == CONTENT
    assert len(site.seen) == requests
    assert "nothing to do" in capsys.readouterr().err


def test_what_broke_off_is_gone_on_with(site: Site) -> None:
    site.break_after = [1_000_000, 700_000, 0]
    assert fetched(params(site)) == CONTENT
    asked = [int(part.removeprefix("bytes=").rstrip("-")) for _, part, _ in site.seen[1:]]
    assert asked == sorted(asked)
    assert 0 < asked[0] <= 1_000_000
    assert asked[1] > asked[0]


def test_a_source_that_changed_meanwhile_is_fetched_anew(site: Site) -> None:
    site.break_after = [1_000_000]
    target = Path("file")

    def once() -> None:
        download._once(f"{site.address}/net.pkl", target, Path("note"), True, None)

    with pytest.raises(download.Broken):
        once()
    assert 0 < target.stat().st_size < len(CONTENT)
    site.content, site.tag = CONTENT[::-1], '"two"'
    once()
    assert target.read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_begins_anew(site: Site) -> None:
    site.ranges, site.break_after = False, [1_000_000]
    assert fetched(params(site)) == CONTENT


def test_what_is_whole_already_is_not_fetched_again(site: Site) -> None:
    target = Path("file")
    download.from_address(f"{site.address}/x", target, note=Path("note"))
    download.from_address(f"{site.address}/x", target, note=Path("note"))
    assert target.read_bytes() == CONTENT
    assert [part for _, part, _ in site.seen] == ["", f"bytes={len(CONTENT)}-"]


def test_passing_troubles_are_waited_out_and_lasting_ones_named(site: Site) -> None:
    site.statuses = [503, 429, 500]
    assert fetched(params(site)) == CONTENT
    site.statuses = [503] * 9
    with pytest.raises(SurroundingsError) as error:
        fetch(params(site), Path("other"), inbox=Path("inputs/net"))
    for part in ("the server answers 503", "bring http://127.0.0.1", SHA, "by hand to inputs/net/net.pkl"):
        assert part in str(error.value)
    assert len(site.seen) == 4 + download.TRIES


def test_without_a_network_the_message_says_what_to_put_where(tmp_path: Path) -> None:
    nowhere = Site(address="http://127.0.0.1:1")
    with pytest.raises(SurroundingsError, match=r"Connection refused.*by hand to inputs/net/net\.pkl, and start again"):
        fetch(params(nowhere), Path("out"), inbox=Path("inputs/net"))
    assert missing(params(nowhere), Path("inputs/net")) == [
        f"inputs/net/net.pkl (http://127.0.0.1:1/net.pkl, {len(CONTENT):,} bytes, sha256 {SHA})"
    ]
    Path("inputs/net").mkdir(parents=True)
    Path("inputs/net/net.pkl").write_bytes(CONTENT)
    assert missing(params(nowhere), Path("inputs/net")) == []
    assert fetched(params(nowhere)) == CONTENT
    assert Path("inputs/net/net.pkl").exists()  # what somebody brought stays theirs


@pytest.mark.timeout(30)
def test_odd_things_where_a_file_was_to_be_put_are_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded instead, and a named pipe is not waited for."""
    brought, entry = Path("inputs/net/net.pkl"), params(site)
    path = FetchParams.model_validate({"files": [{"path": "x", "source": "path", "location": str(brought)}]})
    brought.parent.mkdir(parents=True)
    for make, says in (
        (os.mkfifo, "inputs/net/net.pkl is a named pipe: a file was expected there"),
        (os.mkdir, "inputs/net/net.pkl is a folder: a file was expected there"),
        (lambda place: place.symlink_to("gone"), "inputs/net/net.pkl is a link to nothing"),
        (lambda place: place.symlink_to(place.name), "Too many levels of symbolic links"),
    ):
        make(brought)
        for one in (entry, path):
            with pytest.raises(InputError, match=says):
                fetch(one, Path("out"), inbox=Path("inputs/net"))
            assert len(missing(one, Path("inputs/net"))) == 1
        brought.rmdir() if brought.is_dir() else brought.unlink()
    brought.write_bytes(CONTENT)

    def refuse(path: str, *arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    says = r"net\.pkl cannot be read \(Permission denied\)"
    with monkeypatch.context() as patch, pytest.raises(InputError, match=says):
        patch.setattr("pipestill.userfiles.os.open", refuse)
        fetch(path, Path("out"), inbox=Path("nowhere"))
    assert site.seen == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, f"sha256 {SHA}, {'0' * 64} was expected"),
        ({"size": 7}, f"{len(CONTENT):,} bytes, 7 were expected"),
    ],
)
def test_another_file_than_stated_is_refused_and_not_kept(site: Site, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        fetch(params(site, **changes), Path("out"), inbox=Path("inputs/net"))
    assert not Path("out").exists()
    assert not list(Path("runs").rglob("files/net.pkl"))


def test_a_refusal_is_not_tried_again(site: Site) -> None:
    site.statuses = [404]
    with pytest.raises(InputError, match="the server answers 404"):
        fetch(params(site), Path("out"), inbox=Path("inputs/net"))
    assert len(site.seen) == 1


def test_a_stop_keeps_what_has_come(site: Site) -> None:
    stop = StopRequest()
    stop.reason = "a test"
    with pytest.raises(Stopped, match="what has come is kept"):
        fetch(params(site), Path("out"), inbox=Path("inputs/net"), stop=stop)
    (partial,) = Path("runs").rglob("files/net.pkl")
    assert partial.stat().st_size > 0
    assert fetched(params(site)) == CONTENT
    assert site.seen[-1][1] == f"bytes={partial.stat().st_size if partial.exists() else download.CHUNK}-"


def test_what_is_whole_survives_a_stop_and_is_digested_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[Path] = []
    whole = digests.of_file

    def digest(path: Path) -> str:
        digested.append(path)
        return whole(path)

    def stopped(*_: object) -> None:
        raise Stopped("just before it was published")

    with monkeypatch.context() as patch:
        patch.setattr(Work, "publish", stopped)
        with pytest.raises(Stopped):
            fetch(params(site), Path("out"), inbox=Path("inputs/net"))
    sent = len(site.seen)
    monkeypatch.setattr(digests, "of_file", digest)
    assert fetched(params(site)) == CONTENT
    assert [part for _, part, _ in site.seen[sent:]] == [f"bytes={len(CONTENT)}-"], "nothing comes a second time"
    assert [path.name for path in digested].count("net.pkl") == 3, "checked, stated in the manifest, verified"
    assert not list(Path("runs").rglob("files/net.pkl"))


def test_a_file_that_is_not_pinned_is_named_with_its_digest(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetched(params(site, sha256=None, size=None)) == CONTENT
    assert f"net.pkl has sha256 {SHA}: write it into the parameters" in capsys.readouterr().err


def test_a_path_that_is_not_pinned_is_known_by_its_content(tmp_path: Path) -> None:
    Path("mine.bin").write_bytes(b"first")
    entry = FetchParams.model_validate({"files": [{"path": "net.pkl", "source": "path", "location": "mine.bin"}]})
    first = fetch(entry, Path("out"), inbox=Path("inputs/net")).manifest
    Path("mine.bin").write_bytes(b"second")
    second = fetch(entry, Path("out"), inbox=Path("inputs/net")).manifest
    assert first.key != second.key
    assert Path("out/net.pkl").read_bytes() == b"second"


def test_the_hub_is_asked_for_a_commit_with_the_token(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", site.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    site.token = "hf_secret"
    entry = params(site, source="hub", location="somebody/nets", revision=COMMIT)
    assert fetched(entry) == CONTENT
    assert {authorised for _, _, authorised in site.seen} == {"Bearer hf_secret"}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match="no such repository, or it is private: set HF_TOKEN"):
        fetch(entry, Path("other"), inbox=Path("inputs/net"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "hub", "revision": None}, "a branch's name would change its meaning"),
        ({"revision": COMMIT}, "source=hub and revision"),
        ({"source": "hub", "revision": "main"}, "revision"),
        ({"path": "../net.pkl"}, "path"),
        ({"path": "/etc/net.pkl"}, "path"),
        ({"sha256": "abc"}, "sha256"),
    ],
)
def test_wrong_entries_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        params(Site(address="https://x"), **changes)


def test_the_command_is_one_line_and_its_exit_codes(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    entry = json.loads(params(site).model_dump_json())
    file = write_params(Path("params.yaml"), fetched={"net": entry})
    words = ["fetch", "--name", "net", "--output", "out", "--params", str(file)]
    assert cli.main([*words[:2], "nett", *words[3:]]) == 2
    assert "fetched has no entry 'nett' (there are: net)" in capsys.readouterr().err
    site.statuses = [403]
    assert cli.main(words) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_DEADLINE", "1")  # what --deadline-min sets
        assert cli.main(words) == 75
    assert cli.main(words) == 0
    assert Path("out/net.pkl").read_bytes() == CONTENT


# --- what a hostile or broken server may do -----------------------------------------------------------------------


def test_a_part_of_another_version_is_not_taken(site: Site) -> None:
    site.break_after = [1_000_000]
    with pytest.raises(download.Broken):
        download._once(f"{site.address}/x", Path("file"), Path("note"), True, None)
    site.content, site.tag, site.heedless = CONTENT[::-1], '"two"', True
    with pytest.raises(download.Broken, match="a part of another file"):
        download._once(f"{site.address}/x", Path("file"), Path("note"), True, None)


def test_a_short_part_is_not_the_end(site: Site) -> None:
    site.break_after, site.short = [1_000_000], 500_000
    assert fetched(params(site, sha256=None, size=None)) == CONTENT
    assert len(site.seen) > 4


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ({"extra": {"Content-Encoding": "gzip"}}, "sends the file encoded"),
        ({"silent": True}, "does not say how long the file is"),
        ({"statuses": [302], "extra": {"Location": "ftp://127.0.0.1/x"}}, "which is not followed"),
        ({"statuses": [302], "extra": {"Location": "file:///etc/hostname"}}, "is not allowed"),
    ],
)
def test_what_could_be_another_file_is_refused(site: Site, behaviour: dict[str, Any], says: str) -> None:
    for name, value in behaviour.items():
        setattr(site, name, value)
    with pytest.raises(InputError, match=says):
        fetch(params(site, sha256=None, size=None), Path("out"), inbox=Path("inputs/net"))


def test_a_server_that_always_breaks_off_at_the_same_place_is_given_up(site: Site) -> None:
    site.tag, site.break_after = "", [1_000_000] * 50
    with pytest.raises(SurroundingsError, match=r"it broke off after|Connection|reset"):
        fetch(params(site), Path("out"), inbox=Path("inputs/net"))
    assert len(site.seen) <= 2 * download.TRIES


def test_files_do_not_get_into_each_others_way(site: Site) -> None:
    """A note on the source of one file is no other file's content, and the manifest is nobody's."""
    both = [
        {"path": name, "source": "https", "location": f"{site.address}/net.pkl", "sha256": SHA}
        for name in ("x", "x.source")
    ]
    artifact = fetch(FetchParams.model_validate({"files": both}), Path("out"), inbox=Path("inputs/net"))
    assert [artifact.file(name).read_bytes() == CONTENT for name in ("x", "x.source")] == [True, True]
    for path in ("manifest.json", "LICENCE"):
        with pytest.raises(ValueError, match="a file of the artefact's own"):
            params(site, path=path)
    with pytest.raises(ValueError, match="a is a file and a folder of others"):
        FetchParams.model_validate(
            {"files": [file | {"path": name} for file, name in zip(both, ("a", "a/b"), strict=True)]}
        )
    for location in ("file:///etc/hostname", "http://example.org/x", "data:,x"):
        with pytest.raises(ValueError, match="is no https address"):
            params(site, location=location)
