"""What the doctor's tests examine."""

import os
from pathlib import Path
from typing import Any

import msgspec

from meshnode.cli.doctor import Patient
from meshnode.cli.doctor.system import System


def patient(data_dir: Path, root: Path = Path("/"), **changes: Any) -> Patient:
    """This machine, unless `root` is a folder with another one's files; `changes` replaces fields."""
    made = Patient(
        data_dir=data_dir,
        system=System("apt", False),
        environment={"PATH": os.environ["PATH"], "HOME": "/x"},
        root=root,
    )
    return msgspec.structs.replace(made, **changes)
