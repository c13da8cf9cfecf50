"""The students that ship: each draws in the number of evaluations that it says, what it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL.Image import Image

from fewstep.data.datasets.emoji import read_bundle
from fewstep.encoders.labels import class_names
from fewstep.evaluate.classifier import Classifier
from fewstep.images import open_image
from fewstep.student import FewStepPipeline


@pytest.mark.parametrize(
    ("name", "prompt", "evaluations"),
    [("emoji64-student", "owl", 4), ("emoji-student", "owl", 4), ("fashion-student", "bag", 1)],
)
def test_a_bundled_student_asks_its_network_as_often_as_its_card_says(
    name: str, prompt: str, evaluations: int
) -> None:
    pipe = FewStepPipeline.from_pretrained(name)
    calls: list[int] = []
    pipe.network.transformer.register_forward_hook(lambda *_: calls.append(1))
    first, second = pipe([prompt] * 2, seed=[1, 2], output_type="np").images
    assert len(calls) == pipe.card.sampler.nfe == evaluations
    assert not np.array_equal(first, second), "another seed is another image"


def test_the_bundled_editor_draws_the_emoji_that_it_is_given_in_another_style() -> None:
    """On emoji that were held out; an edit of another emoji's picture is far from what was asked for."""
    images = read_bundle(16).to_pylist()
    known = {image["concept"]: image for image in images if image["style"] == "noto"}
    wanted = [image for image in images if (image["split"], image["style"]) == ("held_out", "twemoji")]
    wanted = [image for image in wanted if image["concept"] in known][:48]
    before = [open_image(known[image["concept"]]["image"]) for image in wanted]
    after = np.stack([np.asarray(open_image(image["image"])) for image in wanted]) / 255
    pipe = FewStepPipeline.from_pretrained("emoji-edit-student")

    def distance(references: list[Image]) -> float:
        drawn = [
            pipe("in twemoji style", image=reference, seed=0, output_type="np").images[0]
            for reference in references
        ]
        return float(np.sqrt(np.square(np.stack(drawn) - after).mean()))

    assert distance(before) < 0.7 * distance(before[1:] + before[:1])


def test_the_bundled_fashion_student_draws_the_class_that_it_is_asked_for() -> None:
    encoder = "labels:fashion-mnist"
    names, classifier = class_names(encoder), Classifier.bundled(encoder)
    assert classifier is not None
    drawn = FewStepPipeline.from_pretrained("fashion-student")(list(names) * 25).images
    right = classifier.classify(np.stack([np.asarray(image) for image in drawn])) == np.arange(250) % len(
        names
    )
    assert right.mean() > 0.9
