from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from fewstep.data.order import ShardOrder
from fewstep.data.schema import Shard
from fewstep.data.stream import ShardStream
from fewstep.data.stream_config import Reading
from fewstep.errors import UserError

WIDE, TALL = (3, 2, 4), (3, 4, 2)
ROWS = {WIDE: [7, 5, 6, 7], TALL: [6, 4, 5]}


def take(stream: ShardStream, count: int) -> list[list[str]]:
    batches = iter(stream)
    try:
        return [batch.keys for batch in itertools.islice(batches, count)]
    finally:
        batches.close()


def planned(info, count: int, part: range = range(4), **options: int) -> list[tuple[int, str]]:
    """(epoch, shard) of the first work items, without reading anything."""
    order = ShardOrder(info.buckets("train"), **{"batch_size": 4, "seed": 0, **options})
    return [(item.epoch, item.shard.path) for item in itertools.islice(order.items(0, part), count)]


def part_of(root: str, part: range, count: int, *, start: int = 0, batch_size: int = 12) -> list[list[str]]:
    """Keys of a part of the first global batches."""
    stream = ShardStream(
        root, "train", batch_size=batch_size, seed=0, parts=[part], start_batch=start, open_shards=3
    )
    return take(stream, count)


def test_one_seed_gives_one_order_and_another_seed_another(make_dataset, ray_cluster):
    root = make_dataset({WIDE: [7, 5, 6]}).root
    first = take(ShardStream(root, "train", batch_size=4, seed=1), 12)
    assert take(ShardStream(root, "train", batch_size=4, seed=1), 12) == first
    assert take(ShardStream(root, "train", batch_size=4, seed=2), 12) != first


def test_a_stream_begun_at_a_batch_equals_the_rest_of_the_whole_one(make_dataset, ray_cluster):
    root = make_dataset(ROWS).root
    whole = take(ShardStream(root, "train", batch_size=4, seed=3), 40)
    for start in (1, 17):
        assert (
            take(ShardStream(root, "train", batch_size=4, seed=3, start_batch=start), 40 - start)
            == whole[start:]
        )


def test_the_order_does_not_depend_on_where_a_pipeline_ends(make_dataset, ray_cluster, monkeypatch):
    root = make_dataset(ROWS).root
    whole = take(ShardStream(root, "train", batch_size=4, seed=3), 24)
    monkeypatch.setattr("fewstep.data.stream.SEGMENT_TASKS", 3)
    monkeypatch.setattr("fewstep.data.stream.TASK_ITEMS", 2)
    assert take(ShardStream(root, "train", batch_size=4, seed=3), 24) == whole


@pytest.mark.parametrize("start", [0, 17])
def test_who_reads_changes_nothing(make_dataset, ray_cluster, start: int) -> None:
    root = make_dataset(ROWS).root
    readings: list[Reading] = ["tasks", "threads"]
    streams = [
        iter(ShardStream(root, "train", batch_size=4, seed=3, start_batch=start, reading=reading))
        for reading in readings
    ]
    for theirs, ours in itertools.islice(zip(*streams, strict=True), 30):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.latent, theirs.latent)
        assert torch.equal(ours.conditioning.states, theirs.conditioning.states)
        assert torch.equal(ours.conditioning.mask, theirs.conditioning.mask)
    for stream in streams:
        stream.close()


def test_each_row_is_used_once_an_epoch(make_dataset, ray_cluster):
    rows = [6, 3, 7, 8]  # no multiples of anything
    whole = part_of(make_dataset({WIDE: rows}).root, range(12), 10)
    seen = Counter(itertools.chain(*whole))
    assert len(seen) == 24
    # Ten batches of 12 are five epochs of 24 rows; shards that are open then are of the fifth or sixth.
    assert set(seen.values()) <= {4, 5, 6}
    order = ShardOrder(make_dataset({WIDE: rows}, name="again").buckets("train"), batch_size=12, seed=0)
    taken = [shard.path for epoch, shard in itertools.islice(order.shards(0), 20) if epoch == 3]
    assert len(set(taken)) == 4


def test_a_batch_is_the_same_for_every_number_of_workers(make_dataset, ray_cluster):
    root = make_dataset(ROWS).root
    whole = part_of(root, range(12), 20)
    for cuts in ([0, 6, 12], [0, 3, 6, 9, 12], [0, 5, 6, 12], [0, 1, 12]):
        shares = [part_of(root, range(*ends), 20) for ends in itertools.pairwise(cuts)]
        assert [list(itertools.chain(*batch)) for batch in zip(*shares, strict=True)] == whole
    for start in (3, 11):
        assert part_of(root, range(5, 9), 20 - start, start=start) == [b[5:9] for b in whole[start:]]


def test_micro_batches_are_parts_of_the_batch(make_dataset, ray_cluster):
    root = make_dataset(ROWS).root
    whole = part_of(root, range(12), 6)
    stream = ShardStream(
        root, "train", batch_size=12, seed=0, parts=[range(2, 4), range(4, 8)], open_shards=3
    )
    micro = take(stream, 12)
    assert [first + second for first, second in zip(micro[::2], micro[1::2], strict=True)] == [
        batch[2:8] for batch in whole
    ]


def test_a_batch_takes_rows_of_several_shards_and_workers_read_different_ones(make_dataset):
    info = make_dataset({WIDE: [4] * 8})
    epochs = [[path for _, path in planned(info, 24)[i : i + 8]] for i in (0, 8, 16)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    shares = [
        {path for epoch, path in planned(info, 4, part) if not epoch} for part in (range(2), range(2, 4))
    ]
    assert all(shares)
    assert not shares[0] & shares[1]


def test_a_dataset_of_fewer_shards_than_workers_is_shared(make_dataset, ray_cluster):
    root = make_dataset({WIDE: [9]}).root
    shares = [part_of(root, range(3 * rank, 3 * rank + 3), 6, batch_size=9) for rank in range(3)]
    for batch in zip(*shares, strict=True):
        assert len(set(itertools.chain(*batch))) == 9


def test_a_far_place_is_found_at_once(make_dataset):
    """The order of ten million samples is skipped without reading anything."""
    shards = {WIDE: tuple(Shard(f"part-{n:05d}.parquet", "train", WIDE, 60 + n % 9) for n in range(4000))}
    order = ShardOrder(shards, batch_size=256, seed=0)
    [item] = itertools.islice(order.items(40_000, range(256)), 1)
    assert item.epoch == 40_000 * 256 // sum(shard.rows for shard in shards[WIDE])


def test_batches_are_full_of_one_shape_and_buckets_come_by_their_rows(make_dataset, ray_cluster):
    root = make_dataset(ROWS).root
    batches = iter(ShardStream(root, "train", batch_size=4, seed=0))
    shapes = Counter()
    for batch in itertools.islice(batches, 60):
        assert len(batch) == len(batch.captions) == len(batch.conditioning) == 4
        assert batch.latent.shape == (4, *batch.shape)
        assert batch.latent[:, 0, 0, 0].tolist() == [int(key.rpartition("-")[2]) for key in batch.keys]
        assert torch.equal(batch.conditioning.mask.sum(1) > 1, torch.ones(4, dtype=torch.bool))
        shapes[batch.shape] += 1
    batches.close()
    assert 0.4 < shapes[WIDE] / 60 < 0.85, "25 of the 40 rows are wide"


def test_buckets_are_drawn_alike_wherever_the_drawing_begins(make_dataset):
    order = ShardOrder(make_dataset(ROWS).buckets("train"), batch_size=4, seed=0)
    draws = list(itertools.islice(order.bucket_draws(0), 5200))
    assert list(itertools.islice(order.bucket_draws(5000), 200)) == draws[5000:]
    before = Counter(draws[:5000])
    assert order.batches_before(5000).tolist() == [before[0], before[1]]


def test_waiting_is_counted_and_trouble_in_the_background_reaches_the_consumer(make_dataset, ray_cluster):
    from pathlib import Path

    info = make_dataset({WIDE: [8, 8]})
    stream = ShardStream(info.root, "train", batch_size=4, seed=0)
    batches = iter(stream)
    next(batches)
    batches.close()
    assert stream.seconds_waited > 0
    Path(info.root, info.shards[1].path).write_bytes(b"broken meanwhile")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        take(stream, 50)


def test_a_stream_that_waits_for_the_training_takes_no_cpu_from_it(make_dataset, ray_cluster):
    import time

    batches = iter(ShardStream(make_dataset({WIDE: [64] * 40}).root, "train", batch_size=4, seed=0))
    next(batches)
    time.sleep(2)
    started = time.process_time()
    time.sleep(3)
    spent = time.process_time() - started
    batches.close()
    assert spent < 0.6, "Ray Data's scheduler lives in the training process and can spin"


def test_training_workers_that_hold_every_cpu_are_still_fed(make_dataset, ray_cluster):
    import ray

    root = make_dataset({WIDE: [8, 8]}).root

    half = int(ray.available_resources()["CPU"] * 50) / 100

    @ray.remote(num_cpus=half)
    class Worker:
        def keys(self, rank: int) -> list[str]:
            stream = ShardStream(root, "train", batch_size=8, seed=0, parts=[range(4 * rank, 4 * rank + 4)])
            return [key for batch in itertools.islice(iter(stream), 2) for key in batch.keys]

    workers = [Worker.remote() for _ in range(2)]
    shares = ray.get([worker.keys.remote(rank) for rank, worker in enumerate(workers)], timeout=120)
    assert len({key for share in shares for key in share}) == 16
