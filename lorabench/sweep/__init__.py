"""What is to be done: the runs of a command, their packs, and the folder that remembers both.

jobs     the runs of one command: planned together, refused together
packs    which runs train together
disk     whether there is room for what they leave
folder   sweep.json, and how far each run is
"""

from lorabench.sweep.compiling import to_compile
from lorabench.sweep.disk import check_room
from lorabench.sweep.folder import (
    LookEntry,
    PackEntry,
    RunEntry,
    SettlingEntry,
    SweepFile,
    SweepFolder,
    entry_of,
    pack_id,
)
from lorabench.sweep.jobs import Job, Mistakes, distinct, first_of_each, plan_jobs
from lorabench.sweep.memory import check_memory, faster
from lorabench.sweep.packs import form_packs

__all__ = [
    "Job",
    "LookEntry",
    "Mistakes",
    "PackEntry",
    "RunEntry",
    "SettlingEntry",
    "SweepFile",
    "SweepFolder",
    "check_memory",
    "check_room",
    "distinct",
    "entry_of",
    "faster",
    "first_of_each",
    "form_packs",
    "pack_id",
    "plan_jobs",
    "to_compile",
]
