"""Files from elsewhere: from an address, resumed where a try before ended, or from a hub repository. Nothing is parsed.

May write the target file and the note that goes with it. Digests are checked by whoever asked for the file.
"""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any, TypeVar

from pipestill.errors import InputError, Stopped, SurroundingsError
from pipestill.progress import Bar, warn
from pipestill.stopping import StopRequest

CHUNK = 1 << 20  # bytes
TRIES = 5
FIRST_PAUSE = 2.0  # seconds before the second try, doubled before each further one
TIMEOUT = 60.0  # seconds without a byte
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may mend

Answer = TypeVar("Answer")


class Broken(Exception):
    """A try that failed in a way that another one may mend; `progressed` where it brought something."""

    def __init__(self, reason: str, *, progressed: bool = False) -> None:
        super().__init__(reason)
        self.progressed = progressed


def from_address(
    address: str, target: Path, *, note: Path, pinned: bool = False, stop: StopRequest | None = None
) -> None:
    """Downloads `address` into `target`, going on where an earlier call ended if the source is still the same.

    `note` is a file that remembers which source that was; `pinned` says that the caller knows the file's size or
    digest. Raises InputError where the address is refused (404, 403) or no length is given for a file that is not
    pinned, SurroundingsError where it cannot be reached or breaks off again and again, Stopped on request; what has
    come by then stays for the next call.
    """
    most = 0  # bytes that any try has reached

    def attempt() -> None:
        nonlocal most
        try:
            _once(address, target, note, pinned, stop)
        except Broken as broken:
            reached = target.stat().st_size if target.exists() else 0
            progressed, most = reached > most, max(reached, most)
            raise Broken(str(broken), progressed=progressed) from None

    insist(attempt, address, stop)


def insist(attempt: Callable[[], Answer], what: str, stop: StopRequest | None) -> Answer:
    """Tries several times with growing pauses; a try that got further does not count. Raises SurroundingsError."""
    failures, pause = 0, FIRST_PAUSE
    while True:
        try:
            return attempt()
        except Broken as broken:
            failures, pause = (1, FIRST_PAUSE) if broken.progressed else (failures + 1, pause)
            if failures >= TRIES:
                raise SurroundingsError(f"{what} cannot be had ({broken})") from None
            warn(f"{what}: {broken}; trying again in {pause:.0f} s")
            _wait(pause, what, stop)
            pause *= 2


def _wait(seconds: float, what: str, stop: StopRequest | None) -> None:
    limit = time.monotonic() + seconds
    while (left := limit - time.monotonic()) > 0:
        _heed(stop, what)
        time.sleep(min(left, 0.2))


def _heed(stop: StopRequest | None, what: str) -> None:
    if stop is not None and stop.requested():
        raise Stopped(f"stopped by {stop.reason} while fetching {what}, what has come is kept: start it again to go on")


def _once(address: str, target: Path, note: Path, pinned: bool, stop: StopRequest | None) -> None:
    """One connection: the rest of the file, or the whole of it where the source is another or cannot give parts."""
    there = target.stat().st_size if target.exists() else 0
    validator = note.read_text(encoding="utf-8") if there and note.exists() else ""
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "pipestill", "Accept-Encoding": "identity"})
        if validator:
            request.add_header("Range", f"bytes={there}-")
            request.add_header("If-Range", validator)
        with urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT) as answer:
            done, total = _where(answer, there, validator)
            if not total and not pinned and "chunked" not in answer.headers.get("Transfer-Encoding", ""):
                raise InputError(f"{address}: the server does not say how long the file is: state its size or sha256")
            if not done:
                target.unlink(missing_ok=True)  # before the note: it must not speak of other bytes
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(_validator(answer.headers), encoding="utf-8")
            came = _receive(answer, target, done, total, lambda: _heed(stop, address))
            if total and done + came < total:
                raise Broken(f"it broke off after {done + came:,} of {total:,} bytes")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part that is asked for lies beyond the end
            if error.headers.get("Content-Range", "").endswith(f"/{there}"):
                return  # all of it is here
            target.unlink(missing_ok=True)
            raise Broken("what is here is longer than the source: beginning anew") from None
        if error.code in PASSING:
            raise Broken(f"the server answers {error.code} {error.reason}") from None
        raise InputError(f"{address}: the server answers {error.code} {error.reason}") from None
    except (http.client.InvalidURL, ValueError) as error:
        raise InputError(f"{address} is no address that can be asked: {error}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise Broken(str(reason) or type(error).__name__) from None


def _where(answer: Any, there: int, validator: str) -> tuple[int, int]:
    """From which byte an answer goes on (0: it begins anew), and how many the whole has (0: unknown)."""
    encoding = answer.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise InputError(f"{answer.url}: the server sends the file encoded ({encoding}), not as it is")
    length = answer.headers.get("Content-Length", "")
    if answer.status != 206:
        return 0, int(length) if length.isdecimal() else 0
    part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if part is None or int(part[1]) != there or _validator(answer.headers) not in ("", validator):
        raise Broken("the server sends another part, or a part of another file, than was asked for")
    return there, int(part[2])


def _receive(answer: Any, target: Path, done: int, total: int, heed: Callable[[], None]) -> int:
    """Writes what comes behind what is there; returns how many bytes came, fewer than expected where it broke off."""
    came = 0
    bar = Bar(target.name, total, done=done, unit="B")
    try:
        with target.open("ab") as file:
            while True:
                try:
                    block = answer.read(CHUNK)
                except (OSError, http.client.HTTPException) as error:  # the network's; the disk's come from below
                    raise Broken(str(error) or type(error).__name__) from None
                if not block:
                    break
                file.write(block)
                came += len(block)
                bar.advance(len(block))
                heed()
            file.flush()
            os.fsync(file.fileno())
    finally:
        bar.close()
    return came


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect away from https, nor to anything but the web."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith("https://") and not (newurl.startswith("http://") and req.type == "http"):
            raise InputError(f"{req.full_url} leads to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _validator(headers: Message) -> str:
    """What says that a later part belongs to the same bytes: a strong tag, or the time of the last change."""
    tag: str = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def from_hub(repository: str, revision: str, name: str, folder: Path, *, stop: StopRequest | None = None) -> None:
    """Downloads a file of a hub repository at a revision to `folder / name`; huggingface_hub goes on by itself.

    `HF_TOKEN` opens private and gated repositories, `HF_ENDPOINT` names another hub, `HF_HUB_OFFLINE` forbids the
    network. Raises InputError (no such repository, revision or file, or no right to it) and SurroundingsError.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{repository}/{name} at {revision}"

    def attempt() -> None:
        try:
            hf_hub_download(repository, name, revision=revision, local_dir=folder)
        except OfflineModeIsEnabled as error:
            raise SurroundingsError(f"{what} cannot be had (HF_HUB_OFFLINE is set)") from error
        except LocalEntryNotFoundError as error:
            cause = error.__cause__ or error
            raise Broken(_first_line(cause)) from None
        except GatedRepoError:
            raise InputError(f"{what} is gated: accept its terms on the hub, and set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise InputError(f"{what}: there is no such repository, or it is private: set HF_TOKEN") from None
        except (EntryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise InputError(f"{what}: {_first_line(error)}") from None
        except HfHubHTTPError as error:
            raise Broken(_first_line(error)) from None
        except (ConnectionError, TimeoutError) as error:
            raise Broken(_first_line(error)) from None

    insist(attempt, what, stop)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
