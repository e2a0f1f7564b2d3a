"""Archive what a table is made from: settings, versions, epochs and every question's accuracy of all runs.

Each suite has a file of its own: `unzip -n experiments/results/table2_runs.zip -d runs` puts its runs back; its report
can then be made anew without training, and an extended suite trains only what is new.
"""

import zipfile
from pathlib import Path

from data.files import written_whole
from experiments.runner import folder_of, jobs_of
from experiments.suite import Suite

_OF_A_RUN = ("config.yaml", "environment.json", "metrics.jsonl")


def keep_evidence(suite: Suite, runs: Path, file: Path) -> None:
    """Write the small files of the suite's finished runs, if there are any, into a zip file."""
    contents: dict[str, bytes] = {}
    for job in jobs_of(suite):
        if not job.is_finished(runs, suite.tests):
            continue
        folder = job.folder(runs)
        paths = [folder / name for name in _OF_A_RUN]
        paths += [folder_of(folder, test) / name for test in suite.tests for name in test.files]
        contents |= {path.relative_to(runs).as_posix(): path.read_bytes() for path in paths}
    if not contents:
        return
    with written_whole(file) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):  # without times: the same runs give the same file
            archive.writestr(zipfile.ZipInfo(name), contents[name], zipfile.ZIP_DEFLATED)
