"""The file of records while it is written: one after another on whole pages; goes on where a killed
run was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from expert_store.manifest.durable import write_all
from expert_store.offline.checkpoint.progress import Journal, Report
from proto.expert import RecordKey
from proto.shm import align_up

RECORDS_NAME, JOURNAL_NAME = "experts.bin", "pack.journal"
_SYNC_BYTES = 256 * 1024 * 1024

WriteRecord = Callable[[int, int], int]
"""Given a descriptor and where a record begins, writes it up to its last byte of payload, gaps
included. Returns its checksum.
"""


@dataclass
class RecordFile:
    """total_bytes: of all records, for `report`; end_bytes: of those there are"""

    descriptor: int
    journal: Journal
    total_bytes: int
    report: Report
    end_bytes: int = 0
    _unsynced_bytes: int = 0

    def add(self, key: RecordKey, payload_end_bytes: int, write: WriteRecord) -> tuple[int, int]:
        """The next record, which is written unless the journal has it: where it begins, and its
        checksum. payload_end_bytes: from there
        """
        start_bytes, record_bytes = self.end_bytes, align_up(payload_end_bytes)
        name, done = str(key), self.journal.done
        if name not in done:
            checksum = write(self.descriptor, start_bytes)
            padding = bytes(record_bytes - payload_end_bytes)
            write_all(self.descriptor, padding, start_bytes + payload_end_bytes)
            self.journal.add(name, checksum)
            self._unsynced_bytes += record_bytes
        if self._unsynced_bytes >= _SYNC_BYTES:
            os.fdatasync(self.descriptor)  # the journal may promise only what is on disk
            self.journal.flush()
            self._unsynced_bytes = 0
        self.end_bytes += record_bytes
        self.report(self.end_bytes, self.total_bytes)
        return start_bytes, done[name]


@contextmanager
def record_file(
    folder: Path, task: dict[str, object], total_bytes: int, report: Report
) -> Iterator[RecordFile]:
    """The file in `folder`, for the block; on disk as a whole after it. task: what is written, as
    the journal has it

    Raises OSError for a full disk.
    """
    path, journal_path = folder / RECORDS_NAME, folder / JOURNAL_NAME
    if not path.exists():  # the journal would promise what is gone
        journal_path.unlink(missing_ok=True)
    with (
        closing(Journal(journal_path, task)) as journal,
        path.open("r+b" if path.exists() else "w+b") as file,
    ):
        found = RecordFile(file.fileno(), journal, total_bytes, report)
        yield found
        file.truncate(found.end_bytes)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        journal.flush()
