"""Makes .venv with the exact versions of requirements.txt and this package; does nothing where that is done.

Runs on any Python 3, so that an old one can say what is needed; a newer one on the path is used where there is one.
What was killed on the way is done again: the stamp is written last.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time

NEEDED = (3, 11)
OTHERS = ["python3.%d" % minor for minor in range(14, NEEDED[1] - 1, -1)]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "requirements.digest")
# An installer writes a package's RECORD last, so a pip that was being unpacked when it was killed has none.
PIP_IS_WHOLE = (
    "import importlib.metadata, sys; sys.exit(not importlib.metadata.distribution('pip').read_text('RECORD'))"
)


def fail(message):
    sys.exit("make: " + message)


def digest():
    """What the environment was made from: the exact versions, this package's own terms, and the Python."""
    found = hashlib.sha256(sys.version.encode())
    for name in ("requirements.txt", "pyproject.toml"):
        with open(os.path.join(ROOT, name), "rb") as file:
            found.update(file.read())
    return found.hexdigest()


def is_made():
    try:
        with open(STAMP, encoding="utf-8") as file:
            return file.read() == digest()
    except OSError:
        return False


def has_pip(python):
    """Whether an environment's Python runs and has all of pip."""
    try:
        return subprocess.call([python, "-c", PIP_IS_WHOLE], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def run(*command):
    code = subprocess.call(command, cwd=ROOT)
    if code:
        fail("'%s' ended with %d: see above; then start make again" % (" ".join(command), code))


def install():
    """Makes the virtual environment where it is not whole, and brings its packages to what is wanted."""
    if os.path.exists(STAMP):
        os.remove(STAMP)  # from here on it holds some of the old packages and some of the new
    python = os.path.join(VENV, "bin", "python")
    if not has_pip(python):
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            fail("this Python cannot make virtual environments: apt-get install python3-venv")
        run(sys.executable, "-m", "venv", "--clear", VENV)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--requirement", "requirements.txt")
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", ".")
    with open(STAMP, "w", encoding="utf-8") as file:
        file.write(digest())


def main():
    if sys.version_info[:2] < NEEDED:
        newer = next(filter(None, map(shutil.which, OTHERS)), None)
        if newer is None:
            fail(
                "python3 is %d.%d, and 3.11 or newer is needed: install one, or say make PYTHON=..."
                % sys.version_info[:2]
            )
        os.execv(newer, [newer, os.path.abspath(__file__)])
    if is_made():
        return
    with open(os.path.join(ROOT, ".venv.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second make waits here, and finds it done
        if is_made():
            return
        started = time.time()
        print("making .venv (some minutes and 7 GB the first time)", file=sys.stderr, flush=True)
        install()
        print("made .venv in %.0f s" % (time.time() - started), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
