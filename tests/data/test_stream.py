from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from fewstep.data.order import ShardOrder
from fewstep.data.stream import ShardStream
from fewstep.errors import UserError

WIDE, TALL = (3, 2, 4), (3, 4, 2)
ROWS = {WIDE: [7, 5, 6, 7], TALL: [6, 4, 5]}


def take(stream: ShardStream, count: int) -> list[list[str]]:
    batches = iter(stream)
    try:
        return [batch.keys for batch in itertools.islice(batches, count)]
    finally:
        batches.close()


def planned(info, count: int, **options: int) -> list[tuple[int, str]]:
    """(epoch, shard) of the first work items, without reading anything."""
    order = ShardOrder(
        info.buckets("train"), **{"batch_size": 4, "seed": 0, "rank": 0, "world_size": 1, **options}
    )
    return [(item.epoch, item.shard.path) for item in itertools.islice(order.items(0), count)]


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


def test_all_ranks_together_see_each_row_once_an_epoch(make_dataset, ray_cluster):
    root = make_dataset({WIDE: [6, 6, 6, 6]}).root
    keys = Counter()
    for rank in range(2):
        stream = ShardStream(root, "train", batch_size=4, seed=0, rank=rank, world_size=2)
        batches = take(stream, 6)
        keys.update(key for batch in batches for key in batch)
        epochs = [sorted(itertools.chain(*batches[:3])), sorted(itertools.chain(*batches[3:]))]
        assert len(set(epochs[0])) == len(set(epochs[1])) == 12
    assert len(keys) == 24
    assert set(keys.values()) == {2}


def test_every_epoch_deals_the_shards_anew(make_dataset):
    info = make_dataset({WIDE: [4] * 8})
    epochs = [[path for _, path in planned(info, 24)[i : i + 8]] for i in (0, 8, 16)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    shares = [{path for epoch, path in planned(info, 4, rank=rank, world_size=2)} for rank in (0, 1)]
    assert not shares[0] & shares[1]


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


def test_all_ranks_draw_the_same_bucket_for_the_same_batch(make_dataset):
    buckets = make_dataset(ROWS).buckets("train")
    orders = [ShardOrder(buckets, batch_size=4, seed=0, rank=rank, world_size=3) for rank in range(3)]
    draws = [list(itertools.islice(order.bucket_draws(5000), 200)) for order in orders]
    assert draws[0] == draws[1] == draws[2] == list(itertools.islice(orders[0].bucket_draws(0), 5200))[5000:]
    before = Counter(itertools.islice(orders[0].bucket_draws(0), 5000))
    assert orders[0].batches_before(5000).tolist() == [before[0], before[1]]


def test_more_ranks_than_shards_is_refused_with_a_remedy(make_dataset):
    root = make_dataset({WIDE: [8, 8, 8]}).root
    with pytest.raises(
        UserError, match=r"has 3 shards .* for 4 workers: set train.workers=3, or .* --shard-rows 3\."
    ):
        ShardStream(root, "train", batch_size=2, seed=0, rank=0, world_size=4)


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
            stream = ShardStream(root, "train", batch_size=4, seed=0, rank=rank, world_size=2)
            return [key for batch in itertools.islice(iter(stream), 2) for key in batch.keys]

    workers = [Worker.remote() for _ in range(2)]
    shares = ray.get([worker.keys.remote(rank) for rank, worker in enumerate(workers)], timeout=120)
    assert len({key for share in shares for key in share}) == 16
