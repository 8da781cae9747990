"""An S3 store on this machine: moto's server as a process of its own on a free port, with one empty bucket."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import urllib.request
from types import TracebackType
from typing import ClassVar

BUCKET = "store"


class S3Server:
    """Runs within a `with` block; `remote` is what `dvc remote add` takes, `environment` what its clients need."""

    environment: ClassVar = {
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    remote = f"s3://{BUCKET}/project"

    def __enter__(self) -> S3Server:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            found = re.search(r"Running on (http://127\.0\.0\.1:\d+)", line)
            if found:
                break
        else:
            raise RuntimeError(f"moto's server ended with {self._process.wait()}:\n{''.join(said)}")
        # its log of requests would fill the pipe
        self._drain = threading.Thread(target=self._process.stderr.read, daemon=True)
        self._drain.start()
        self.address = found[1]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(urllib.request.Request(f"{self.address}/{BUCKET}", method="PUT"), timeout=60).close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._drain.join()
