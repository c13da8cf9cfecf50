"""Encoding of captions and images on their way to the training: actors that do it, and the reading of raw shards.

A dataset that was prepared with `--encode stream` holds raw rows: captions, and images or where they lie. Its shards
are made of the same rows as those of an encoded dataset, so that both are read in one order, by one code (`stream`).
Whoever reads a raw shard has it encoded, by actors that live as long as the run: a Ray Data pipeline's own actors would
be started, and models loaded, anew for each of the short pipelines that the stream consists of.

Encoding a shard is a pure function of its rows. An actor that dies is started again, and what it had begun is encoded
once more: nothing is lost or doubled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa

from fewstep.data.cache import ShardCache
from fewstep.data.members import at_addresses
from fewstep.data.prepare import EncodeImages, EncodeText, PreparationConfig, pack, unpack
from fewstep.data.schema import DatasetInfo, bucket_of, read_raw
from fewstep.data.seeds import stable_hash
from fewstep.data.stream_config import CacheConfig, EncodersConfig, PoolConfig
from fewstep.errors import UserError
from fewstep.images import Size
from fewstep.storage import Storage

PIECE = 32
"""Rows that are encoded at a time, so that the first batch need not wait for all rows of the shards that it is of."""


class RowEncoder:
    """Encodes rows of a raw dataset in this process.

    Args:
        info: the dataset.
    """

    def __init__(self, info: DatasetInfo) -> None:
        assert info.raw is not None, "only the shards of raw datasets are to be encoded"
        encoding = info.encoding
        config = PreparationConfig(
            sizes=(),
            text_encoder=encoding.text_encoder,
            autoencoder=encoding.autoencoder,
            max_tokens=encoding.max_tokens,
            max_pixels=info.raw.max_pixels,
            min_size=info.raw.min_size,
        )
        images = None if info.raw.images is None else at_addresses(info.raw.images)
        self._sizes = info.raw.sizes
        self._text = EncodeText(config)
        self._images = EncodeImages(config, encoding, images, info.storage, info.has_latents)

    def texts(self, item: dict[str, Any]) -> dict[str, Any]:
        """A shard (`path`, and `rows` that `pack` packed) with its captions encoded."""
        return self._text(item)

    def finish(self, item: dict[str, Any]) -> tuple[pa.Table, list[dict[str, str]]]:
        """What `texts` returned as a table of SCHEMA, its images encoded; and the rows that could not be encoded."""
        split, shape = bucket_of(item["path"])
        size = Size.parse(self._sizes["x".join(map(str, shape))])
        bucket = {"width": size.width, "height": size.height, "shape": shape, "split": split}
        return self._images.table({**item, **bucket})

    def encode(self, path: str, rows: pa.Table) -> pa.Table:
        """Rows of the shard at `path` as a table of SCHEMA, without those that can't be encoded."""
        table, _ = self.finish(self.texts({"path": path, "rows": pack(rows)}))
        return table


class ShardEncoder(RowEncoder):
    """Actor that encodes the captions of shards, or the images of those whose captions are encoded.

    Args:
        info: the dataset.
        images: whether images are its part; of prompts without images, captions are all there is to do.
    """

    def __init__(self, info: DatasetInfo, images: bool) -> None:
        super().__init__(info)
        self._does_images, self._finishes = images, images or not info.has_latents
        self._told: set[str] = set()

    def encode_shard(self, item: dict[str, Any]) -> Any:
        """A shard, as `texts` takes and returns it; or, where this actor's part is the last, its table, packed.

        Rows that can't be encoded are replaced by others that are encoded with them, so that the order, which counts on
        the shard's number of rows, stays what it is.
        """
        if not self._does_images:
            item = {**self.texts(item), "count": len(unpack(item["rows"]))}
        if not self._finishes:
            return item
        table, refused = self.finish(item)
        count = item["count"]
        if not len(table):
            first = refused[0]
            raise UserError(
                f"not one of {count} rows of {item['path']} can be encoded ({first['where']}: {first['reason']}, "
                f"{first['detail']}): mend the source, and prepare the data again."
            )
        if refused and item["path"] not in self._told:
            self._told.add(item["path"])
            print(
                f"{item['path']}: others take the place of {len(refused)} of its {count} rows, the first: "
                f"{refused[0]['where']}, {refused[0]['reason']}, {refused[0]['detail']}",
                flush=True,
            )
        return pack(table.take([index % len(table) for index in range(count)]))


@dataclass(frozen=True)
class EncoderPool:
    """Reads raw shards, and has running actors encode them.

    Attributes:
        text, images: handles of actors; no `images` for prompts without any.
        cache: where encoded shards are kept; None keeps none.
    """

    text: tuple[Any, ...]
    images: tuple[Any, ...]
    cache: ShardCache | None = None

    @property
    def piece(self) -> int | None:
        """Rows that are encoded at a time; None for whole shards, which the cache keeps."""
        return PIECE if self.cache is None else None

    @classmethod
    def start(
        cls, info: DatasetInfo, config: EncodersConfig, cache: CacheConfig | None = None
    ) -> EncoderPool:
        """Start the actors; their models are loaded when the first shard comes."""
        return cls(
            _actors(info, config.text, images=False),
            _actors(info, config.images, images=True) if info.has_latents else (),
            None if cache is None else ShardCache.of(cache, info),
        )

    def stop(self) -> None:
        """End the actors."""
        for actor in (*self.text, *self.images):
            # After what it is doing; and never again, as the end of a process would otherwise count as a failure.
            actor.__ray_terminate__.options(max_task_retries=0).remote()

    def tables(self, storage: Storage, wanted: Sequence[tuple[str, np.ndarray]]) -> Iterator[pa.Table]:
        """See `order.ShardReader`; all that is asked for is on its way to the actors at once.

        Raises:
            UserError: a shard can't be read, or none of the rows be encoded.
        """
        import ray

        kept = [None if self.cache is None else self.cache.read(path) for path, _ in wanted]
        coming = [
            self._submit(storage, path, rows) if table is None else None
            for (path, rows), table in zip(wanted, kept, strict=True)
        ]
        for (path, rows), table, reference in zip(wanted, kept, coming, strict=True):
            if table is None:
                content: Any = ray.get(cast(Any, reference))
                table = unpack(content)
                if self.cache is None:  # these rows alone were encoded
                    yield table
                    continue
                self.cache.write(path, table)
            yield table.take(rows)

    def _submit(self, storage: Storage, path: str, rows: np.ndarray) -> Any:
        """The reference to a table, packed, that actors are going to make: of these rows, or for the cache of all."""
        place = stable_hash(0, path)  # spreads shards also between workers that know nothing of each other
        raw = read_raw(storage, path)
        item = {"path": path, "rows": pack(raw if self.cache is not None else raw.take(rows))}
        encoded = self.text[place % len(self.text)].encode_shard.remote(item)
        if not self.images:
            return encoded
        return self.images[place % len(self.images)].encode_shard.remote(encoded)


def _actors(info: DatasetInfo, config: PoolConfig, *, images: bool) -> tuple[Any, ...]:
    import ray

    # Started again as often as they die, and what they had begun is done again. A large argument would lie in the
    # object store, and be gone when an actor is to start again: encoders need no list of shards.
    info = replace(info, shards=())
    kind = ray.remote(
        num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_restarts=-1, max_task_retries=-1
    )(ShardEncoder)
    return tuple(kind.remote(info, images) for _ in range(config.size))
