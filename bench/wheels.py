"""Packages that a machine lacks and cannot fetch: wheels that travelled with the project.

`pip download --no-deps -d .whl tyro docstring_parser typeguard` fills the folder. Only what is not
installed is taken, and only wheels of plain Python, which run wherever they are unpacked.
"""

import importlib.metadata
import os
import re
import sys
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def missing(folder):
    """The wheels of plain Python in `folder` whose packages are not installed, sorted."""
    found = []
    for wheel in sorted(Path(folder).glob("*-none-any.whl")):
        name, version = re.split(r"-", wheel.name)[:2]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(wheel)
    return found


def unpack(folder=REPO / ".whl"):
    """Make the packages of missing() importable here and in every process started from here.

    Returns the folder that they were unpacked to, or None where nothing was missing.
    """
    wheels, site = missing(folder), Path(folder) / "site"
    if not wheels:
        return None
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    sys.path.append(str(site))
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(site)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    return site
