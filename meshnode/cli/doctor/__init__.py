"""`meshnode doctor`: what is missing on this machine, and the command that mends it.

Parts: `finding` (what a check returns, and what it may know), `system` (which commands this system has), `machine`,
`network`, `tools` (the checks), `examine` (all of them at once). Printing is the command's business; nothing here
changes anything.
"""

from meshnode.cli.doctor.examine import CHECKS, examine
from meshnode.cli.doctor.finding import Check, Finding, Patient, Result, Told, Versions

__all__ = ["CHECKS", "Check", "Finding", "Patient", "Result", "Told", "Versions", "examine"]
