from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_run import MODEL, RandomBatches, stage1, teachers

import iv2kernels
from iv2.checkpoint import save_weights
from iv2.config import Stage1Config
from iv2.models.teachers import TEACHERS, build_teacher
from iv2.models.vision import VisionEncoder
from iv2.stages.stage1 import Stage1, build_stage1, every_frame, fit_decoders, num_kept
from iv2kernels import attention_guided_mask, random_mask, tube_mask

HALF = Stage1Config(mask_ratio=0.5)


def batch(size=3, dtype=torch.float32):
    found = next(RandomBatches(size))
    return found | {"video": found["video"].to(dtype)}


def cosine_loss(decoder, prediction, target):
    """Mean of 2 - 2 cos, with every step written out."""
    y = F.layer_norm(
        prediction, prediction.shape[-1:], decoder.norm.weight, decoder.norm.bias, 1e-5
    )
    y, t = F.normalize(y, dim=-1), F.normalize(target, dim=-1)
    return (2 - 2 * (y * t).sum(-1)).mean()


def clip_tokens(out, frames):
    """The teacher's frames as one clip: mean CLS first, then the patches in time."""
    stacked = []
    for layer in out.tokens:
        per_frame = layer.unflatten(1, (frames, -1))
        cls = per_frame[:, :1, 0]  # the teacher has put the mean into the first frame's
        stacked.append(torch.cat([cls, per_frame[:, :, 1:].flatten(1, 2)], 1))
    return stacked


def test_losses_are_the_written_out_ones():
    stage = stage1(HALF).double().eval()
    clip_teacher, mae_teacher = (t.double() for t in stage._teachers)
    found = batch(dtype=torch.float64)
    video, seeds = found["video"], found["seeds"]
    losses = stage(found)
    seen = video[:, :, ::2]
    first, second = clip_teacher(seen), mae_teacher(video)
    keep = attention_guided_mask(seeds, first.attention, 2).long()  # 4 patches a frame, 2 frames
    visible = torch.zeros(3, 8, dtype=torch.bool).scatter_(1, keep, value=True)
    student = stage.student
    predictions = student.predict(seen, keep)
    with_cls = F.pad(visible, (1, 0), value=True)
    clip = [
        cosine_loss(decoder, x, target[with_cls].view_as(x))
        for decoder, x, target in zip(
            student.clip_decoder, predictions.clip, clip_tokens(first, 2), strict=True
        )
    ]
    mae = [
        cosine_loss(decoder, x, target[visible].view_as(x))
        for decoder, x, target in zip(
            student.mae_decoder, predictions.mae, second.tokens, strict=True
        )
    ]
    pooled = cosine_loss(student.final_clip_decoder, predictions.final, first.pooled)
    torch.testing.assert_close(losses["clip"], sum(clip) / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["mae"], sum(mae) / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["clip_pooled"], pooled, rtol=1e-9, atol=0)
    assert stage.loss_weights == {"clip": 1.0, "clip_pooled": 1.0, "mae": 1.0}


def test_a_student_of_tubelets_shares_its_slots_with_both_teachers():
    clip_teacher, mae_teacher = teachers()
    model = fit_decoders(replace(MODEL, tubelet_size=2, num_frames=4), clip_teacher, mae_teacher)
    stage = Stage1(VisionEncoder(model), HALF, clip_teacher, mae_teacher).eval()
    found = batch()
    video = found["video"]
    first, second = stage.targets(video)
    alone = clip_teacher(video[:, :, ::2].contiguous())  # a frame of each tubelet
    torch.testing.assert_close(first.attention, alone.attention)
    assert second.tokens[0].shape[1] == first.attention[0].numel() == 8
    assert every_frame(video, stage.stride) is video
    assert all(torch.isfinite(loss) for loss in stage(found).values())


def grads_of(stage, found, impl=None):
    stage.zero_grad()
    with iv2kernels.use(impl):
        losses = stage(found)
        torch.stack(list(losses.values())).sum().backward()
    results = {name: loss.detach() for name, loss in losses.items()}
    grads = {n: p.grad.clone() for n, p in stage.student.named_parameters() if p.grad is not None}
    return results, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_kernels_agree_with_the_reference(dtype):
    stage, found = stage1(HALF, dtype), batch(4)
    ids_keep = stage.masks(
        found["video"][:, :, ::2],
        found["seeds"],
        stage.targets(found["video"], found["video"][:, :, ::2].contiguous())[0],
    )
    stage.masks = lambda *_: ids_keep  # maps that differ in the last bit may draw another patch
    truth_stage = stage1(HALF).double()
    truth_stage.student.load_state_dict(stage.student.state_dict())
    for teacher in truth_stage._teachers:
        teacher.double()
    truth_stage.masks = lambda *_: ids_keep
    losses, grads = grads_of(stage, found)
    eager_losses, eager_grads = grads_of(stage, found, "reference")
    truth, truth_grads = grads_of(truth_stage, found | {"video": found["video"].double()})
    # The teachers are float32 in both: the targets' own rounding sets the floor of the losses.
    for name in truth:
        torch.testing.assert_close(losses[name].double(), truth[name].double(), rtol=2e-2, atol=0)
        torch.testing.assert_close(losses[name], eager_losses[name], rtol=2e-3, atol=0)
    assert grads.keys() == truth_grads.keys()
    for name in grads:
        if truth_grads[name].norm() > 0:
            loose(name, grads[name], eager_grads[name], truth_grads[name])


def loose(name, got, eager, truth):
    """The rule for a whole network: kernels' roundings are not the same ones as eager's."""
    error = (got.double() - truth).norm() / truth.norm()
    eager_error = (eager.double() - truth).norm() / truth.norm()
    floor = 1e-5 if got.dtype == torch.float32 else 2e-2
    assert error <= max(1.5 * eager_error, floor), f"{name}: {error:.2e}, eager {eager_error:.2e}"


def test_two_masks_average_two_single_ones():
    found = batch()
    seen = every_frame(found["video"], 2)
    both = stage1(replace(HALF, num_masks=2)).eval()  # without drop path
    single = stage1(HALF).eval()
    first, _ = both.targets(found["video"], seen)
    ids = [both.masks(seen, found["seeds"], first, stream) for stream in (0, 1)]
    assert not torch.equal(*ids)
    calls = 0
    forward = both._teachers[0].forward

    def count(video):
        nonlocal calls
        calls += 1
        return forward(video)

    both._teachers[0].forward = count
    losses = both(found)
    assert calls == 1
    parts = []
    for chosen in ids:
        single.masks = lambda *_, chosen=chosen: chosen
        parts.append(single(found))
    for name in losses:
        torch.testing.assert_close(losses[name], (parts[0][name] + parts[1][name]) / 2)


def test_masks_of_a_clip_have_other_drop_paths():
    stage = stage1(replace(HALF, num_masks=2))
    seen = []
    predict = stage.student.predict
    stage.student.predict = lambda *a, seeds: seen.append(seeds) or predict(*a, seeds=seeds)
    stage(batch())
    assert not torch.equal(*seen)


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_masks_without_attention(mask):
    stage = stage1(replace(HALF, mask=mask))
    found = batch()
    ids = stage.masks(found["video"][:, :, ::2], found["seeds"], None)
    tubes = tube_mask(found["seeds"], 2, 4, 2)
    assert torch.equal(ids, tubes if mask == "tube" else random_mask(found["seeds"], 8, 4))


def test_attention_over_the_clip():
    stage = stage1(replace(HALF, mask_window="clip"))
    found = batch()
    seen = every_frame(found["video"], 2)
    first, _ = stage.targets(found["video"], seen)
    want = attention_guided_mask(found["seeds"], first.attention.flatten(1)[:, None], 4)
    assert torch.equal(stage.masks(seen, found["seeds"], first), want)


def test_counts_are_the_published_ones():
    assert (num_kept(256, 0.8), num_kept(2048, 0.8)) == (52, 410)


@pytest.mark.parametrize("which", [{"mae": False}, {"clip": False}])
def test_one_teacher(which):
    config = HALF if which.get("clip", True) else replace(HALF, mask="tube", clip_teacher="")
    stage = stage1(config, **which)
    losses = stage(batch())
    names = {"mae": {"clip", "clip_pooled"}, "clip": {"mae"}}[next(iter(which))]
    assert losses.keys() == names == stage.loss_weights.keys()
    torch.stack(list(losses.values())).sum().backward()
    needing = [n for n, p in stage.named_parameters() if p.requires_grad and p.grad is None]
    assert not needing  # DDP would wait for them
    assert stage.stride == (2 if "clip" in which else 1)


def test_teachers_stay_out():
    stage = stage1(HALF)
    assert stage.state_dict().keys() == {f"student.{n}" for n in stage.student.state_dict()}
    stage.train()
    for teacher in stage._teachers:
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())


def test_uint8_video_is_taken():
    found = batch()
    found["video"] = torch.randint(0, 256, (3, 4, 28, 28, 3), dtype=torch.uint8)
    losses = stage1(HALF)(found)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_misfits_are_named():
    clip_teacher, mae_teacher = teachers()
    student = VisionEncoder(fit_decoders(MODEL, clip_teacher, mae_teacher))
    with pytest.raises(ValueError, match=r"mae_return_layer of the student must be 0 .*, got 2"):
        Stage1(student, HALF, clip_teacher)
    wide = build_teacher(
        "teacher-video-tiny", (0, 1), embed_dim=64, depth=2, num_heads=2, img_size=28
    )
    with pytest.raises(ValueError, match=r"mae_teacher_embed_dim .* must be 64 .*, got 32"):
        Stage1(student, HALF, clip_teacher, wide)
    pairs = VisionEncoder(fit_decoders(replace(MODEL, tubelet_size=2), None, mae_teacher))
    odd = build_teacher(
        "teacher-video-tiny", (0, 1), embed_dim=32, depth=2, num_heads=2, tubelet_size=1
    )
    tubes = replace(HALF, mask="tube")
    with pytest.raises(ValueError, match=r"tubelets of 2 must .* divide .* got 2 and 1"):
        Stage1(pairs, tubes, None, odd)
    stage = stage1(HALF)
    found = batch()
    found["video"] = torch.zeros(3, 3, 4, 42, 42)
    with pytest.raises(ValueError, match=r"student's 18 patches \(2 x 3 x 3\), got 8"):
        stage(found)
    with pytest.raises(ValueError, match="without a pooling map, got attention"):
        stage.masks(found["video"], found["seeds"], None)


def test_build_from_files(tmp_path):
    image, video = build_teacher("teacher-image-tiny"), build_teacher("teacher-video-tiny")
    save_weights(image.state_dict(), tmp_path / "image.safetensors")
    save_weights(video.state_dict(), tmp_path / "video.safetensors")
    config = Stage1Config(
        clip_teacher="teacher-image-tiny",
        clip_teacher_path=str(tmp_path / "image.safetensors"),
        mae_teacher="teacher-video-tiny",
        mae_teacher_path=str(tmp_path / "video.safetensors"),
    )
    stage = build_stage1(replace(MODEL, depth=4), config)
    first, second = stage._teachers
    assert first.encoder.config.img_size == second.encoder.config.img_size == 28
    assert next(first.parameters()).dtype == torch.bfloat16
    assert torch.equal(first.encoder.cls_token, image.encoder.cls_token.bfloat16())
    assert stage.student.config.clip_return_layer == len(TEACHERS["teacher-image-tiny"][2])
    with pytest.raises(ValueError, match=r"clip_teacher must be one of internvl-6b, .*, got no"):
        build_stage1(MODEL, replace(config, clip_teacher="no"))
    with pytest.raises(ValueError, match=r"mae_teacher_path must be the file of .*, got nothing"):
        build_stage1(MODEL, replace(config, mae_teacher_path=""))


def test_autocast_is_close():
    stage, found = stage1(HALF), batch()
    exact = stage(found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = stage(found)
    for name in exact:
        torch.testing.assert_close(rough[name], exact[name], rtol=5e-2, atol=1e-2)


def test_targets_of_clips_that_come_again_are_kept():
    found, other = batch(4), batch(4)
    other = other | {"video": other["video"].flip(0)}  # the same clips in other places
    plain = stage1(HALF)
    kept = stage1(replace(HALF, teacher_cache_bytes=1 << 20))
    asked = []
    teacher = kept._teachers[1]
    forward = teacher.forward
    teacher.forward = lambda video: asked.append(len(video)) or forward(video)
    for video in (found["video"], other["video"]):
        for got, want in zip(kept.targets(video), plain.targets(video), strict=True):
            assert (got.patches_per_frame, got.has_cls) == (want.patches_per_frame, want.has_cls)
            torch.testing.assert_close(got.tokens, want.tokens)
            torch.testing.assert_close(got.attention, want.attention)
            assert (got.pooled is None) == (want.pooled is None)
            if got.pooled is not None:
                torch.testing.assert_close(got.pooled, want.pooled)
    assert asked == [4]
    changed = found["video"].clone()
    changed[2, 0, 0, 0, 0] += 1
    kept.targets(changed)
    assert asked == [4, 1]
    twice = found["video"][[1, 1, 3]]  # one clip twice in a batch
    for got, want in zip(kept.targets(twice), plain.targets(twice), strict=True):
        torch.testing.assert_close(got.tokens, want.tokens)
    assert asked == [4, 1]


def test_a_full_cache_asks_again():
    found = batch(3)
    one = stage1(HALF).targets(found["video"][:1])
    size = sum(output.num_bytes for output in one)
    stage = stage1(replace(HALF, teacher_cache_bytes=2 * size))
    asked = []
    teacher = stage._teachers[1]
    forward = teacher.forward
    teacher.forward = lambda video: asked.append(len(video)) or forward(video)
    stage.targets(found["video"])
    stage.targets(found["video"])
    assert asked == [3, 1]  # the third clip does not fit
    with pytest.raises(ValueError, match="teacher_cache_bytes must be >= 0, got -1"):
        Stage1Config(teacher_cache_bytes=-1)
