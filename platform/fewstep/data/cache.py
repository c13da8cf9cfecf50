"""A bounded cache of encoded shards on local disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from fewstep.data.schema import PLAN, DatasetInfo, parquet_bytes, read_shard
from fewstep.data.stream_config import CacheConfig
from fewstep.errors import UserError
from fewstep.storage import Storage


@dataclass(frozen=True)
class ShardCache:
    """Encoded shards of one dataset, in a folder of its own in the cache's.

    Attributes:
        root: folder of the cache.
        name: of the dataset's folder in it: a hash of its rows and encoders.
        max_bytes: most bytes of all files in `root`.
        metadata: of shards, as Parquet files have it.
    """

    root: Path
    name: str
    max_bytes: int
    metadata: dict[bytes, bytes]

    @classmethod
    def of(cls, config: CacheConfig, info: DatasetInfo) -> ShardCache:
        """The cache of a raw dataset."""
        # The plan has a digest of the rows. Without one, the manifest tells datasets apart.
        plan = info.storage.read(PLAN) or json.dumps([asdict(shard) for shard in info.shards]).encode()
        if not info.has_latents:
            plan += b"captions alone"  # of a dataset that may have images, which others want
        digest = hashlib.sha256(plan + json.dumps(asdict(info.encoding)).encode()).hexdigest()
        root = Path(config.path).expanduser().absolute()
        return cls(root, digest[:24], int(config.max_gb * 1e9), info.encoding.metadata())

    @property
    def _storage(self) -> Storage:
        return Storage.at(self.root / self.name)

    def read(self, path: str) -> pa.Table | None:
        """The shard at this path of the dataset; None if it is not kept, or its file is broken."""
        file = self.root / self.name / path
        if not file.exists():
            return None
        with contextlib.suppress(
            UserError, OSError
        ):  # deleted in this moment, or by a disk's fault no whole file
            table = read_shard(self._storage, path)
            os.utime(file)
            return table
        return None

    def write(self, path: str, table: pa.Table) -> None:
        """Keep a shard, whole or not at all, if there is room for it. That it can't be written is said, once."""
        content = parquet_bytes(table.replace_schema_metadata(self.metadata))
        try:
            if self._makes_room(content.nbytes):
                self._storage.write(path, content)
        except (OSError, UserError) as error:
            _warn(f"data.cache: nothing can be kept, and each epoch is encoded anew: {error}")

    def _makes_room(self, wanted: int) -> bool:
        """Whether so many bytes fit, if need be after deleting shards of other datasets.

        Several processes that write at the same moment may go beyond the limit, by one shard each.
        """
        files = sorted(self._files(), key=lambda file: file[1])
        free = self.max_bytes - sum(size for _, _, size in files)
        for file, _, size in files:
            if free >= wanted:
                break
            if file.relative_to(self.root).parts[0] != self.name:
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()
                free += size
        return free >= wanted

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        """All files of the cache, with time of last use, and size."""
        for file in self.root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if file.is_file():
                    status = file.stat()
                    yield file, status.st_mtime, status.st_size


@functools.cache
def _warn(message: str) -> None:
    """Print a message, once in this process."""
    print(message, flush=True)
