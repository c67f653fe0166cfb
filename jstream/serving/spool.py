"""The folder in which alerts wait: one JSON file each, whole or not there, so that a killed server loses none.

A file gets its name when all of it is on the disk, and is removed when its alert is over. What cannot be read is set
aside under another name, for somebody to look at. One server has the folder at a time. Nothing here knows what is in
the files, or sends any.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

from jstream.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows, where nothing hinders a second server
    fcntl = None

LOCK = "lock"
PARTIAL, DAMAGED = ".partial", ".damaged"


class Spool:
    """A folder of JSON objects, by their ids; made where missing, for the user's eyes alone.

    Raises:
        UserError: it cannot be written, or another server has it.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UserError(
                f"--spool={folder}: expected a folder that can be written, found: {error.strerror}; name another"
            ) from None
        try:
            if fcntl:  # let go by the system however this process ends
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(
                f"--spool={folder}: expected a folder of this server alone, found another one's; give each its own"
            ) from None

    def read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """What waits, oldest file first, and the names of files that were damaged and set aside now.

        What a killed server had not finished writing is removed: nobody was told that it was there.
        """
        entries, damaged = [], []
        for partial in self.folder.glob(f"*{PARTIAL}"):
            partial.unlink()
        for path in sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
            try:
                entry = json.loads(path.read_bytes())
                if not isinstance(entry, dict) or path != self._path(str(entry.get("id"))):
                    raise ValueError("not an alert, or not the one that its name says")
            except (ValueError, OSError, RecursionError):
                self._set_aside(path)
                damaged.append(path.name)
            else:
                entries.append(entry)
        return entries, damaged

    def write(self, entry: dict[str, Any]) -> None:
        """Puts an object on the disk, under its `id`; when this returns, a power cut does not lose it.

        Raises:
            OSError: it is not there.
        """
        path = self._path(entry["id"])
        partial = path.with_suffix(PARTIAL)
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(json.dumps(entry).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            self._sync_folder()
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def remove(self, id: str) -> None:
        """Forgets an object. A power cut may bring it back."""
        self._path(id).unlink(missing_ok=True)

    def set_aside(self, id: str) -> str:
        """Keeps an object out of the way that turned out to be damaged; the name of its file."""
        self._set_aside(self._path(id))
        return self._path(id).name

    def close(self) -> None:
        """Lets go of the folder; what is in it stays."""
        os.close(self._lock)

    def _path(self, id: str) -> pathlib.Path:
        """An id may hold anything, and a file's name may not."""
        return self.folder / (hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:32] + ".json")

    def _set_aside(self, path: pathlib.Path) -> None:
        os.replace(path, path.with_suffix(DAMAGED))

    def _sync_folder(self) -> None:
        if os.name == "nt":  # which opens no folders
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
