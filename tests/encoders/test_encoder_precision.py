"""Text encoders in lower precisions, and encoders that leave the GPU between batches."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_pipelines import CAPTIONS, name, pipeline, tokenizer  # noqa: F401 (fixtures)
from transformers import T5Config, T5EncoderModel

from fewstep.config import Precision
from fewstep.encoders import load_encoder
from fewstep.encoders.memory import should_offload
from fewstep.encoders.text import TextEncoder
from fewstep.errors import UserError

LOWERED: tuple[Precision, ...] = ("bfloat16", "int8", "int4")
ERROR = {"bfloat16": 0.02, "int8": 0.05, "int4": 0.3}
"""Largest distance from float32's states, as a share of their length, of MiniLM."""
SIZE = {"bfloat16": 0.51, "int8": 0.39, "int4": 0.33}
"""Largest share of float32's bytes; half of MiniLM's weights are its words, which aren't made of integers."""


@pytest.fixture(scope="module")
def exact() -> TextEncoder:
    return load_encoder()


@pytest.fixture(scope="module", params=LOWERED)
def lowered(request: pytest.FixtureRequest) -> TextEncoder:
    return load_encoder(precision=request.param)


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    a, b = torch.cat(one), torch.cat(other)
    return float((a - b).norm() / b.norm())


def test_lower_precisions_take_less_memory_and_change_states_little(exact, lowered):
    captions = ["a red heart on a table", "", "an owl, noto style"]
    states = lowered.states(captions)
    assert {state.dtype for state in states} == {torch.float32}
    assert 0 < distance(states, exact.states(captions)) < ERROR[lowered.precision]
    assert lowered.nbytes < SIZE[lowered.precision] * exact.nbytes
    assert (exact.precision, exact.nbytes) == ("float32", 4 * 22_713_216 + 8 * 512 * 2)
    null = lowered.null().states
    assert torch.equal(null, null.half().float()), "rounded as shards are"


def test_what_shards_hold_does_not_depend_on_the_batch_in_any_precision(lowered):
    captions = ["a dog", "", "a red heart on a table", "an owl, noto style"]
    together = lowered.stored_states(captions * 3)
    for index, caption in enumerate(captions):
        [alone] = lowered.stored_states([caption])
        for other in together[index :: len(captions)]:
            # The last bit of bfloat16 may differ between kernels.
            torch.testing.assert_close(other, alone, atol=2**-7, rtol=2**-7)


def test_without_a_precision_it_is_float32_to_the_bit(exact):
    same = load_encoder(precision="float32")
    assert torch.equal(torch.cat(same.states(CAPTIONS)), torch.cat(exact.states(CAPTIONS)))


@pytest.mark.parametrize("precision", LOWERED)
def test_flux_1s_t5_is_lowered_and_its_clip_is_never_made_of_integers(name, precision):  # noqa: F811
    encoder, exact = load_encoder(name, precision=precision), load_encoder(name)
    assert {weight.dtype for weight in encoder._clip.parameters()} == {torch.bfloat16}
    assert encoder.precision == precision
    assert encoder.nbytes < exact.nbytes
    assert distance(encoder.states(CAPTIONS), exact.states(CAPTIONS)) < 0.3
    assert distance(encoder.pooled(CAPTIONS), exact.pooled(CAPTIONS)) < 0.02


@pytest.mark.parametrize("precision", LOWERED)
def test_pipelines_language_models_are_lowered(pipeline, precision):  # noqa: F811
    _, name, *_ = pipeline  # noqa: F811
    encoder, exact = load_encoder(name, precision=precision), load_encoder(name)
    assert (encoder.precision, exact.precision) == (precision, "float32")
    assert encoder.nbytes < 0.6 * exact.nbytes
    # These have widths of 8 and 16, and random weights: blocks of 4 bits reach over many rows.
    assert distance(encoder.states(CAPTIONS), exact.states(CAPTIONS)) < 0.6


@pytest.mark.parametrize(("precision", "library"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_a_missing_library_is_named(precision, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"precision {precision} needs {library}: pip install"):
        load_encoder(precision=precision)
    assert load_encoder("labels:4", precision=precision, offload=True).nbytes == 0


LOAD = """
import sys, threading, torch
from fewstep.encoders import load_encoder

def own():  # bytes that are no file's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

load_encoder(sys.argv[1], precision=sys.argv[3])  # what is imported and made once
before, peak, done = own(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, own())

thread = threading.Thread(target=watch)
thread.start()
encoder = load_encoder(sys.argv[2], precision=sys.argv[3])
done.set()
thread.join()
print(encoder.nbytes, peak - before)
"""


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_weights_are_read_straight_to_their_type(precision, tmp_path):
    sizes = {"small": (64, 1), "large": (1024, 6)}
    for size, (width, layers) in sizes.items():
        config = T5Config(
            vocab_size=8, d_model=width, d_kv=64, d_ff=4 * width, num_layers=layers, num_heads=width // 64,
            pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        T5EncoderModel(config).save_pretrained(tmp_path / size)
        tokenizer("$A </s>", tmp_path / size)
    # Otherwise glibc keeps what small allocations had, in gaps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large"), precision],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    takes, peak = map(int, done.stdout.split())
    assert peak < 1.3 * takes + 16 * 2**20  # and the two largest layers


@pytest.mark.parametrize(
    ("setting", "takes", "free", "leaves"),
    [
        (True, 5, 100, True), (False, 5, 0, False), ("auto", 5, 5, False), ("auto", 5, 4, True),
        (True, 5, None, False), ("auto", 5, None, False),
    ],
)  # fmt: skip
def test_an_encoder_leaves_the_device_where_less_is_free_than_it_takes(setting, takes, free, leaves):
    assert should_offload(setting, takes, free) is leaves


class Moves:
    """What models of an encoder do: where they go, and when they compute. They stay on the CPU."""

    def __init__(self, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str]] = []
        self.fail = False
        for which, model in zip("tc", encoder._models, strict=False):
            monkeypatch.setattr(model, "to", self._watched(which, "", model.to))
            monkeypatch.setattr(model, "forward", self._watched(which, "computes", model.forward))
        encoder.offload()
        encoder._visits._device = torch.device("meta")  # stands for the GPU: nothing can go there

    def _watched(self, which: str, what: str, known: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.seen.append((which, what or torch.device(args[0]).type))
            if self.fail and what:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return known(*args, **kwargs) if what else None

        return watched


@pytest.fixture
def flux(name) -> Iterator[tuple[TextEncoder, Moves]]:  # noqa: F811
    encoder = load_encoder(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield encoder, Moves(encoder, monkeypatch)


T5_VISITS = [("t", "meta"), ("t", "computes"), ("t", "cpu")]
CLIP_VISITS = [("c", "meta"), ("c", "computes"), ("c", "cpu")]


def test_models_that_wait_on_the_host_visit_the_device_one_after_the_other(flux, name):  # noqa: F811
    encoder, moves = flux
    assert moves.seen == [("t", "cpu"), ("c", "cpu")]
    exact = load_encoder(name)
    for call in ("conditioning", "each", "encode"):
        moves.seen.clear()
        [one], [other] = (list(getattr(e, call)(["a dog"])) for e in (encoder, exact))
        assert moves.seen == T5_VISITS + CLIP_VISITS
        assert torch.equal(one.states, other.states)
        assert torch.equal(one.pooled, other.pooled)
    moves.seen.clear()
    with pytest.raises(UserError, match="too long"):
        encoder.each(["dog " * 600])
    assert moves.seen == [], "a caption that is refused moves nothing"


def test_where_it_does_not_fit_a_sentence_says_so_and_the_model_is_back(flux):
    encoder, moves = flux
    moves.seen.clear()
    moves.fail = True
    with pytest.raises(
        UserError, match=r"the text encoder 'flux:.*' does not fit .*: load it in a lower prec"
    ):
        encoder.each(["a dog"])
    assert moves.seen == T5_VISITS
    moves.fail = False
    assert encoder.each(["a dog"])[0].states.isfinite().all()


def test_threads_take_turns_at_a_model_that_visits(flux):
    encoder, moves = flux
    moves.seen.clear()
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: encoder.states(["a dog"]), range(9)))
    assert moves.seen == T5_VISITS * 9


def test_that_it_waits_on_the_host_is_told_once(exact, caplog, monkeypatch):
    encoder = load_encoder()
    with caplog.at_level(logging.INFO, "fewstep.encoders.text"):
        encoder.offload()
        encoder.each(["a dog"])
    [line] = [record.message for record in caplog.records if record.name == "fewstep.encoders.text"]
    assert line == (
        "the text encoder minilm waits on the host: its 0.1 GB visit the device for each batch of captions"
    )
    assert torch.equal(encoder.each(["a dog"])[0].states, exact.each(["a dog"])[0].states)


def test_on_a_cpu_nothing_is_moved():
    assert load_encoder(offload=True)._visits is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["float32", *LOWERED])
def test_a_model_on_a_gpu_leaves_and_comes_back_unchanged(precision):
    stays = load_encoder(device="cuda", precision=precision)
    before = torch.cuda.memory_allocated()
    leaves = load_encoder(device="cuda", precision=precision, offload=True)
    assert torch.cuda.memory_allocated() - before < leaves.nbytes / 10
    for one, other in pairwise([stays.states(CAPTIONS), leaves.states(CAPTIONS), leaves.states(CAPTIONS)]):
        assert all(map(torch.equal, one, other))
    assert torch.cuda.memory_allocated() - before < leaves.nbytes / 10


def test_torchaos_weights_can_be_moved():
    # To "meta" for want of a GPU. (bitsandbytes' can't go there: torch makes new parameters of them on the way.)
    encoder = load_encoder(precision="int8")
    encoder._model.to("meta")
    assert {weight.device.type for weight in encoder._model.parameters()} == {"meta"}
