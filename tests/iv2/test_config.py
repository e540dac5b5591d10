from __future__ import annotations

import json
from dataclasses import replace

import pytest

from iv2.config import (
    DataConfig,
    OptimConfig,
    SourceConfig,
    Stage1Config,
    TrainConfig,
    differences,
    from_dict,
    from_json,
    to_dict,
    to_json,
)
from iv2.recipes import RECIPES, recipe
from iv2.train import total_steps


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(RECIPES[name]))
    assert from_json(path) == RECIPES[name]
    assert not differences(RECIPES[name], json.loads(path.read_text()))


def test_absent_fields_take_defaults():
    assert from_dict(TrainConfig, {"seed": 3}) == TrainConfig(seed=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sed": 1}, "field must be one of stage, run_dir, .*, got sed"),
        ({"optim": {"learning_rate": 1}}, "OptimConfig: field must be one of .*got optim.learn"),
        (
            {"stage": "stage9"},
            "config: stage must be one of stage1, stage2, clip, stage3, finetune, got 'stage9'",
        ),
        ({"seed": "one"}, "config: seed must be int, got 'one'"),
        ({"optim": {"betas": [0.9]}}, r"config: optim.betas must be tuple.*, got \[0.9\]"),
        ({"optim": {"lr": True}}, "config: optim.lr must be float, got True"),
    ],
)
def test_bad_content(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        from_json(path)
    assert str(path) in str(caught.value)


def test_broken_json_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        from_json(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(batch_size=0), "DataConfig: batch_size must be positive, got 0"),
        (lambda: SourceConfig(weight=-1), "SourceConfig: weight must be >= 0, got -1"),
        (lambda: SourceConfig(num_frames=-1), "SourceConfig: num_frames must be >= 0, got -1"),
        (lambda: OptimConfig(lr=0), "OptimConfig: lr must be positive, got 0"),
        (lambda: OptimConfig(epochs=0), "OptimConfig: epochs must be positive, got 0"),
        (lambda: OptimConfig(accumulate=0), "OptimConfig: accumulate must be positive, got 0"),
        (lambda: OptimConfig(muon_lr_scale=-1), "OptimConfig: muon_lr_scale must be >= 0, got -1"),
        (lambda: Stage1Config(mask_ratio=1), r"mask_ratio must be in \[0, 1\), got 1"),
        (lambda: Stage1Config(num_masks=0), "num_masks must be positive, got 0"),
        (lambda: Stage1Config(clip_teacher="", mae_teacher=""), "must be given, got neither"),
        (lambda: Stage1Config(clip_teacher=""), "mask must be tube or random without a clip_teach"),
        (lambda: TrainConfig(save_every=0), "TrainConfig: save_every must be positive, got 0"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_differences_name_what_changed():
    base = TrainConfig()
    other = replace(base, seed=1, run_dir="elsewhere", optim=replace(base.optim, lr=1.0))
    assert differences(other, to_dict(base)) == ["optim.lr 1.0 (there 0.00015)", "seed 1 (there 0)"]


def test_fields_that_another_lacks_are_as_by_default():
    """A run that began before a field existed goes on."""
    base = TrainConfig()
    older = to_dict(base)
    del older["stage1"]["teacher_cache_bytes"], older["stage3"]["learns"]
    assert not differences(base, older)
    changed = replace(base, stage1=replace(base.stage1, teacher_cache_bytes=1))
    assert differences(changed, older) == ["stage1.teacher_cache_bytes 1 (there 0)"]


def test_a_field_that_is_no_longer_there_is_a_difference():
    (found,) = differences(TrainConfig(), to_dict(TrainConfig()) | {"gone": 1})
    assert "got gone" in found


def test_sources_may_move_but_not_change():
    def config(path, kind):
        return TrainConfig(data=DataConfig(sources=(SourceConfig(path, kind),)))

    assert not differences(config("a", "audio"), to_dict(config("b", "audio")))
    assert differences(config("a", "audio"), to_dict(config("a", "video"))) == [
        "data.sources.0.kind 'audio' (there 'video')"
    ]


def test_unknown_recipe_names_the_others():
    with pytest.raises(ValueError, match=r"recipe must be one of stage1-1b, stage1-6b, .*, got no"):
        recipe("no")


@pytest.mark.parametrize(
    ("name", "gpus", "lr", "min_lr"),
    [
        ("stage1-1b", 128, 2.4e-3, 1.6e-4),
        ("stage1-6b", 256, 1.2e-3, 8e-5),
        ("distill-s", 32, 1.6e-2, 1.6e-4),
        ("distill-b", 32, 1.6e-2, 1.6e-4),
        ("distill-l", 32, 8e-3, 8e-5),
    ],
)
def test_published_learning_rates(name, gpus, lr, min_lr):
    config = RECIPES[name]
    scale = config.data.batch_size * gpus / config.optim.lr_batch
    assert config.optim.lr * scale == pytest.approx(lr)
    assert config.optim.min_lr * scale == pytest.approx(min_lr)


def test_published_epochs():
    optim = RECIPES["stage1-1b"].optim
    assert total_steps(optim, 4096 * 10, 4096) == (3010, 400)
    assert total_steps(replace(optim, steps=7, warmup_steps=3), 100, 10) == (7, 3)
