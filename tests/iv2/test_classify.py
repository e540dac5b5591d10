from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from iv2.config import FinetuneConfig
from iv2.data.clips import Sample, read_list
from iv2.data.dataset import ClipConfig
from iv2.data.synthetic import write_toyworld
from iv2.data.transforms import CropConfig
from iv2.eval.classify import (
    accuracy,
    attentive_probe,
    encode_labels,
    fit_logistic,
    linear_probe,
    probe,
    split,
)
from iv2.eval.features import extract, ordered_batches
from iv2.models.teachers import build_teacher
from iv2.models.vision import build_encoder, vision_config
from iv2.stages.finetune import Finetune, build_finetune, find_classes

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 28, "num_frames": 4}
CLIP = ClipConfig(num_frames=4, crop=CropConfig(kind="whole", size=28))

pytestmark = pytest.mark.usefixtures("one_thread")


def clouds(num, dim=6, classes=3, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    y = torch.randint(classes, (num,), generator=generator)
    return centres[y] + spread * torch.randn(num, dim, generator=generator), y


def test_logistic_regression_is_at_the_minimum():
    x, y = clouds(60)
    x = x.double()
    weight = fit_logistic(x, y, torch.zeros(3, 7, dtype=torch.float64), 0.1).requires_grad_()
    scores = x @ weight[:, :-1].T + weight[:, -1]
    loss = F.cross_entropy(scores, y) + 0.05 * weight[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-5


def test_linear_probe_tells_clouds_apart():
    train, test = clouds(200), clouds(100, seed=1)
    result = linear_probe(*train, *test)
    assert result.accuracy > 0.9
    assert result == linear_probe(*train, *test)
    shifted = linear_probe(train[0] * 1000 + 5, train[1], test[0] * 1000 + 5, test[1])
    assert shifted.accuracy == pytest.approx(result.accuracy, abs=0.02)
    noise = torch.randn(200, 6, generator=torch.Generator().manual_seed(3))
    assert linear_probe(noise, train[1], test[0], test[1]).accuracy < 0.7


def test_attentive_probe_finds_the_token():
    """The class is told by one token among many, at no fixed place: no mean would show it."""
    generator = torch.Generator().manual_seed(0)
    marks = 4 * torch.randn(3, 16, generator=generator)

    def make(num):
        y = torch.randint(3, (num,), generator=generator)
        x = torch.randn(num, 20, 16, generator=generator)
        x[torch.arange(num), torch.randint(20, (num,), generator=generator)] = marks[y]
        return x, y

    (x, y), (x_test, y_test) = make(200), make(100)
    result = attentive_probe(x, y, x_test, y_test, steps=200)
    assert result.accuracy > 0.9
    torch.manual_seed(5)  # the global generator plays no part
    before = torch.get_rng_state()
    assert attentive_probe(x, y, x_test, y_test, steps=200) == result
    assert torch.equal(torch.get_rng_state(), before)


def test_split_keeps_proportions():
    y = torch.tensor([0] * 10 + [1] * 20)
    fit, held = split(y, 0.2, 0)
    assert sorted(torch.cat([fit, held]).tolist()) == list(range(30))
    assert y[held].bincount().tolist() == [2, 4]


def test_labels_of_the_test_follow_the_training():
    y, y_test = encode_labels(["b", "a", "b"], ["a", "c"])
    assert y.tolist() == [1, 0, 1]
    assert y_test.tolist() == [0, -1]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return read_list(write_toyworld(folder, 16, 0, size=28, num_frames=16, workers=1))


def test_features_of_a_list(toy):
    encoder = build_encoder("tiny", **SMALL, attn_pool_num_heads=2).train()
    found = extract(encoder, ordered_batches(toy, CLIP, 5), layers=(0, -1), keep_tokens=True)
    assert encoder.training
    assert found.paths == [sample.path for sample in toy]
    assert found.values("colour") == [sample.attributes["colour"] for sample in toy]
    assert found.vectors.keys() == {
        "pooled",
        *(f"blocks.{i}.{what}" for i in (0, 1) for what in ("cls", "mean")),
    }
    tokens = found.tokens["blocks.1"]
    assert tokens.shape == (16, 17, 32)
    torch.testing.assert_close(found.vectors["blocks.1.cls"], tokens[:, 0])
    torch.testing.assert_close(found.vectors["blocks.1.mean"], tokens[:, 1:].mean(1))
    again = extract(encoder, ordered_batches(toy, CLIP, 16), layers=(0, -1))
    torch.testing.assert_close(again.vectors["pooled"], found.vectors["pooled"])
    for kind in ("linear", "attentive"):
        result = probe(found, found, ["colour"], kind=kind, steps=20)["colour"]
        assert 0 <= result.accuracy <= 1
    with pytest.raises(ValueError, match="kind must be linear or attentive, got round"):
        probe(found, found, ["colour"], kind="round")
    with pytest.raises(ValueError, match=r"must have its tokens kept \(none\), got blocks.1"):
        probe(again, again, ["colour"], kind="attentive")
    with pytest.raises(ValueError, match=r"name must be one of pooled, .*, got cls"):
        found.cat("cls")
    with pytest.raises(ValueError, match="smell must be given for each clip: "):
        found.values("smell")
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        extract(encoder, [])


def test_classes_of_a_list(toy):
    classes = find_classes(toy, ["motion", "colour"])
    assert classes["motion"] == sorted({s.attributes["motion"] for s in toy})
    labels = [Sample("a", label=2), Sample("b", label=0)]
    assert find_classes(labels, []) == {"label": [0, 1, 2]}
    with pytest.raises(ValueError, match="label must be given for each clip: c"):
        find_classes([*labels, Sample("c")], [])
    with pytest.raises(ValueError, match="kind must have two values or more"):
        find_classes([Sample("a", attributes={"kind": 1})] * 2, ["kind"])


@pytest.mark.parametrize("teacher", ["", "teacher-image-tiny", "teacher-video-tiny"])
def test_finetune_losses(toy, teacher):
    classes = find_classes(toy, ["motion", "colour"])
    config = FinetuneConfig(attributes=("motion", "colour"), teacher=teacher)
    stage = build_finetune(vision_config("tiny", **SMALL), config, classes).eval()
    clip = replace(CLIP, crop=CropConfig(kind="centre", size=56), random=False) if teacher else CLIP
    batch = next(ordered_batches(toy, clip, 8))
    losses = stage(batch)
    scores = stage.scores(batch)
    for name in classes:
        assert scores[name].shape == (8, len(classes[name]))
        y = torch.tensor([classes[name].index(a[name]) for a in batch["attributes"]])
        chances = 0.9 * F.one_hot(y, len(classes[name])) + 0.1 / len(classes[name])
        expected = -(chances * scores[name].log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(losses[name], expected)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in stage.parameters())
    found = accuracy(stage, ordered_batches(toy, clip, 6))
    assert found.keys() == classes.keys()
    assert all(0 <= v <= 1 for v in found.values())
    batch["attributes"][2] = {"motion": "sideways", "colour": "red"}
    with pytest.raises(ValueError, match=r"motion must be one of .*, got sideways: .*\.mp4"):
        stage(batch)


def test_finetune_by_label():
    model = build_encoder("tiny", **SMALL, num_classes=3)
    stage = Finetune(model, {"label": [0, 1, 2]})
    batch = {
        "video": torch.randn(2, 3, 4, 28, 28),
        "seeds": torch.arange(2),
        "labels": torch.tensor([2, 0]),
        "paths": ["a", "b"],
        "attributes": [{}, {}],
    }
    expected = F.cross_entropy(model.logits(batch["video"]), batch["labels"])
    torch.testing.assert_close(stage(batch)["label"], expected)


def test_trained_teacher_is_a_teacher(tmp_path):
    """What supervised training saves loads as a frozen teacher."""
    from iv2.checkpoint import save_weights
    from iv2.models.teachers import load_teacher

    for name in ("teacher-image-tiny", "teacher-video-tiny"):
        stage = Finetune(build_teacher(name, num_classes=4), {"kind": [0, 1, 2, 3]})
        path = tmp_path / f"{name}.safetensors"
        save_weights(stage.trained.state_dict(), path)
        teacher = load_teacher(name, path, dtype=torch.float32)
        own = stage.model.encoder.state_dict()
        assert all(torch.equal(t, own[n]) for n, t in teacher.encoder.state_dict().items())
