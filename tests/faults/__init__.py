"""The table of faults, by area; ``python tests/faults`` makes `docs/reliability.md` of it."""

from faults import commandline, data, models, resume, settings, storage
from faults.fault import Fault

AREAS: dict[str, list[Fault]] = {
    "Command line and recipes": commandline.FAULTS,
    "Rows and files of rows": data.FAULTS,
    "Settings": settings.FAULTS,
    "Models and tokenizers": models.FAULTS,
    "Going on from a checkpoint": resume.FAULTS,
    "Files and folders that a run writes": storage.FAULTS,
}
