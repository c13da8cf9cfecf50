#!/usr/bin/env bash
# pyarrow 25.0.1: a table with a column of binary_view can't be reordered or filtered, by no column of it.
#
# One would guess: views (16 bytes that point into shared memory) exist so that rows of large values, such as latents
#   and token states, can be selected and permuted without copying the values. So take, filter and sort are what they
#   are best at.
# What happens: casting from large_binary is free, concatenating and unique work, but take, filter and sorting by
#   another column raise ArrowNotImplementedError. A dictionary whose values are the column itself, and whose indices
#   are the order, does what was wanted: it is made in microseconds, is pickled with its one copy of the values, and
#   take, filter and sort work on its indices.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyarrow==25.0.1
cat > "$folder/try.py" <<'P'
import os

import pyarrow as pa

values = pa.array([os.urandom(2**21) for _ in range(16)], pa.large_binary())
order = pa.array(range(15, -1, -1), pa.int32())
columns = {
    "large_binary": values,
    "binary_view": values.cast(pa.binary_view()),
    "dictionary": pa.DictionaryArray.from_arrays(pa.array(range(16), pa.int32()), values),
}
for name, column in columns.items():
    table = pa.table({"tensor": column, "key": order})
    ways = {
        "take": lambda: table.take(order),
        "filter": lambda: table.filter(pa.array([True] * 12 + [False] * 4)),
        "sort_by key": lambda: table.sort_by("key"),
        "concat": lambda: pa.concat_tables([table, table]),
    }
    for what, way in ways.items():
        before = pa.total_allocated_bytes()
        try:
            made = way()
            copied = pa.total_allocated_bytes() - before > 2**24
            del made
            print(f"{name}: {what} {'copies the values' if copied else 'copies no value'}")
        except pa.ArrowNotImplementedError:
            print(f"{name}: {what} is not implemented")
P
"$folder/venv/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
large_binary: take copies the values
large_binary: filter copies the values
large_binary: sort_by key copies the values
large_binary: concat copies no value
binary_view: take is not implemented
binary_view: filter is not implemented
binary_view: sort_by key is not implemented
binary_view: concat copies no value
dictionary: take copies no value
dictionary: filter copies no value
dictionary: sort_by key copies no value
dictionary: concat copies no value
SEEN
