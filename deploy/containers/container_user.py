"""Who the containers run as, and what that user can read of what they mount."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from proto import errors

_NOT_ROOT = 10001


@dataclass(frozen=True)
class ContainerUser:
    """The user that the containers run as: ours, or one of no account when we are root."""

    uid: int
    gid: int

    @classmethod
    def of_this_process(cls) -> ContainerUser:
        return cls(os.getuid(), os.getgid()) if os.getuid() else cls(_NOT_ROOT, _NOT_ROOT)

    def take(self, path: Path) -> None:
        """Make this user the owner of a file or a whole folder. Does nothing when it is ours."""
        if self.uid == os.getuid():
            return
        for each in (path, *path.rglob("*")):
            os.chown(each, self.uid, self.gid, follow_symlinks=False)

    def give_copy(self, source: Path, target: Path) -> None:
        """A secret that this user alone can read. A reader sees the old file or the new one.

        Raises ConfigInvalid naming a source that cannot be read.
        """
        try:
            secret = source.read_bytes()
        except OSError as error:
            raise errors.ConfigInvalid(f"cannot read {source}: {error.strerror}") from error
        new = target.with_name(f"{target.name}.new")
        new.unlink(missing_ok=True)
        new.touch(mode=0o600)
        new.write_bytes(secret)
        self.take(new)
        new.replace(target)

    def check_can_read(self, folder: Path, names: Iterable[str]) -> None:
        """Open every one of `names` in `folder` as this user. The folders above `folder` do not
        matter, as a mount hides them.

        Raises ConfigInvalid naming the first that cannot be opened.
        """
        with _opened(folder) as root, self._acting():
            for name in (".", *names):
                try:
                    os.close(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root))
                except PermissionError as error:
                    raise errors.ConfigInvalid(
                        f"the containers run as user {self.uid}, who may not read "
                        f"{folder / name}: chmod -R o+rX {folder}, or run container-config as "
                        "the owner of the files"
                    ) from error

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """Act as this user, with its one group, for the block."""
        if self.uid == os.getuid():
            yield
            return
        groups, uid, gid = os.getgroups(), os.geteuid(), os.getegid()
        os.setgroups([])
        os.setegid(self.gid)
        os.seteuid(self.uid)
        try:
            yield
        finally:
            os.seteuid(uid)
            os.setegid(gid)
            os.setgroups(groups)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Open a folder as a mount does: by its path alone, whatever its mode. Raises ConfigInvalid."""
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.ConfigInvalid(f"cannot open {folder}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
