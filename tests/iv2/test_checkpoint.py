from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import iv2
from iv2.checkpoint import (
    CheckpointError,
    convert,
    load_checkpoint,
    load_training_checkpoint,
    read_weights,
    save_training_checkpoint,
    save_weights,
)
from iv2.models.vision import build_encoder

SMALL = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "attn_pool_num_heads": 2,
    "clip_embed_dim": 16,
}
DECODERS = {
    "clip_return_layer": 1,
    "clip_teacher_embed_dim": 24,
    "clip_teacher_final_dim": 16,
}


def small(preset=None, **overrides):
    options = SMALL | (DECODERS if preset in ("stage1", "stage2", "distill") else {})
    options |= {"mae_return_layer": 1, "mae_teacher_embed_dim": 8} if preset == "stage1" else {}
    encoder = build_encoder("tiny", preset, **(options | overrides))
    generator = torch.Generator().manual_seed(len(list(encoder.parameters())))
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return encoder


def assert_same_state(model, state):
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


@pytest.mark.parametrize("preset", ["stage1", "distill", "stage2", "clip", "finetune"])
@pytest.mark.parametrize("file", ["bare.bin", "module.pth", "model.pt", "bare.safetensors"])
def test_published_formats_load_strict(preset, file, tmp_path):
    source, path = small(preset), tmp_path / file
    state = source.state_dict()
    prefix = "vision_encoder." if preset in ("stage2", "clip") else ""
    content = {prefix + n: t for n, t in state.items()}
    if preset == "stage2":
        content |= {"temp": torch.ones(()), "text_encoder.cls.weight": torch.ones(3)}
    if file.endswith("safetensors"):
        save_file(content, path)
    else:
        wrapper = path.stem
        content = content if wrapper == "bare" else {wrapper: content, "epoch": 3}
        torch.save(content, path)
    model = build_encoder("tiny", preset, **_config_of(source))
    report = iv2.load_checkpoint(model, path)
    assert_same_state(model, state)
    assert len(report.loaded) == len(state)
    assert report.prefix == prefix
    assert report.missing == ()
    assert report.reshaped == {}
    assert len(report.unexpected) == (2 if preset == "stage2" else 0)


def _config_of(encoder):
    return {k: v for k, v in vars(encoder.config).items()}


def test_arguments_beside_the_weights_do_not_hinder(tmp_path):
    source = small()
    content = {"model": source.state_dict(), "args": argparse.Namespace(lr=1.0), "epoch": 1}
    torch.save(content, tmp_path / "a.pth")
    load_checkpoint(small(), tmp_path / "a.pth")
    # what DDP and torch.compile put in front of each name
    wrapped = {f"module._orig_mod.{n}": t for n, t in source.state_dict().items()}
    torch.save(wrapped, tmp_path / "b.pth")
    model = small("finetune")
    report = load_checkpoint(model, tmp_path / "b.pth", allow_missing=["fc_norm.*", "head.*"])
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert "4 missing: fc_norm.weight" in str(report)


def test_what_a_module_saves_as_its_student_loads(tmp_path):
    stage = torch.nn.ModuleDict({"student": small(), "teacher": torch.nn.Linear(2, 2)})
    save_training_checkpoint(tmp_path / "run.pt", {"model": stage.state_dict(), "step": 3})
    report = load_checkpoint(small(), tmp_path / "run.pt")
    assert report.prefix == "student."
    assert report.unexpected == ("teacher.weight", "teacher.bias")
    other = small()
    load_checkpoint(other, tmp_path / "run.pt", prefix="student.")
    assert_same_state(other, stage["student"].state_dict())


def test_position_tables_follow_frames_and_size(tmp_path):
    source = small("stage1", img_size=56, num_frames=4)
    save_weights(source.state_dict(), tmp_path / "a.safetensors")
    model = small("stage1", img_size=84, num_frames=8)
    with pytest.raises(ValueError, match="64 patch rows, which fit no or several grids: give num"):
        load_checkpoint(model, tmp_path / "a.safetensors")
    report = load_checkpoint(model, tmp_path / "a.safetensors", num_frames=4)
    assert set(report.reshaped) == {"pos_embed", "clip_pos_embed", "mae_pos_embed"}
    assert report.reshaped["mae_pos_embed"] == ((1, 64, 32), (1, 8 * 36, 32))
    old = source.pos_embed[0, 1:].view(4, 16, 32).permute(1, 2, 0)
    frames = F.interpolate(old, size=8, mode="linear").permute(2, 1, 0).reshape(8, 32, 4, 4)
    expected = F.interpolate(frames, size=(6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[0, 1:], expected.reshape(-1, 32))
    assert torch.equal(model.pos_embed[0, 0], source.pos_embed[0, 0])
    # in one axis the file needs no help
    for change in ({"img_size": 56, "num_frames": 8}, {"img_size": 56, "num_frames": 2}):
        assert load_checkpoint(small("stage1", **change), tmp_path / "a.safetensors").reshaped


def test_published_tables_are_recognised_by_their_rows(tmp_path):
    source = {"pos_embed": torch.randn(1, 1025, 32)}
    save_weights(source, tmp_path / "a.pth")
    model = small(img_size=336, num_frames=8)
    report = load_checkpoint(model, tmp_path / "a.pth", allow_missing=["*"])
    assert report.reshaped == {"pos_embed": ((1, 1025, 32), (1, 1 + 8 * 576, 32))}
    same = small(img_size=448, num_frames=4)  # 4096 rows: 16 frames of 16x16, or as the caller says
    save_weights({"pos_embed": torch.randn(1, 4097, 32)}, tmp_path / "b.pth")
    assert not load_checkpoint(same, tmp_path / "b.pth", allow_missing=["*"]).reshaped
    load_checkpoint(same, tmp_path / "b.pth", allow_missing=["*"], num_frames=16)
    with pytest.raises(ValueError, match="which do not fit num_frames=3"):
        load_checkpoint(same, tmp_path / "b.pth", allow_missing=["cls_token"], num_frames=3)


@pytest.mark.parametrize("kind", ["sep_pos_embed", "sep_image_video_pos_embed"])
def test_other_tables_follow_too(kind, tmp_path):
    preset = "stage1" if kind == "sep_pos_embed" else "stage2"
    source = small(preset, **{kind: True}, num_frames=4)
    save_weights(source.state_dict(), tmp_path / "a.pth")
    model = small(preset, **{kind: True}, num_frames=6)
    report = load_checkpoint(model, tmp_path / "a.pth")
    if kind == "sep_pos_embed":
        names = {f"{p}pos_embed_temporal" for p in ("", "clip_", "mae_")}
        expected = F.interpolate(source.pos_embed_temporal.transpose(1, 2), size=6, mode="linear")
        torch.testing.assert_close(model.pos_embed_temporal, expected.transpose(1, 2))
    else:
        names = {"pos_embed", "clip_pos_embed"}
    assert set(report.reshaped) == names
    larger = small(preset, **{kind: True}, num_frames=4, img_size=84)
    report = load_checkpoint(larger, tmp_path / "a.pth")
    if kind == "sep_pos_embed":
        names = {f"{p}pos_embed_spatial" for p in ("", "clip_", "mae_")}
    else:
        names |= {"img_pos_embed", "clip_img_pos_embed"}
        assert larger.img_pos_embed.shape == (1, 37, 32)
    assert set(report.reshaped) == names


def test_features_do_not_care_whether_tables_were_adapted_on_loading(tmp_path):
    source = small(num_frames=4).eval()
    save_weights(source.state_dict(), tmp_path / "a.safetensors")
    model = small(num_frames=8).eval()
    load_checkpoint(model, tmp_path / "a.safetensors")
    video = torch.randn(1, 3, 8, 56, 56)
    torch.testing.assert_close(model(video).pooled, source(video).pooled)


def test_image_patches_are_inflated(tmp_path):
    source, model = small(), small(tubelet_size=2)
    save_weights(source.state_dict(), tmp_path / "a.pth")
    report = load_checkpoint(model, tmp_path / "a.pth", allow_missing=["pos_embed"])
    assert "patch_embed.proj.weight" in report.reshaped
    weight = model.patch_embed.proj.weight
    assert torch.equal(weight[:, :, 1:], source.patch_embed.proj.weight)
    assert not weight[:, :, 0].any()


def test_missing_tensors_are_an_error_unless_named(tmp_path):
    source = small()
    state = source.state_dict()
    del state["blocks.1.ls2.gamma"], state["cls_token"]
    torch.save(state, tmp_path / "a.pth")
    model = small("finetune")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"6 are missing: cls_token, .*blocks\.1\.ls2\.gamma"):
        load_checkpoint(model, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"2 are missing: cls_token, blocks\.1\.ls2\.gamma"):
        load_checkpoint(model, tmp_path / "a.pth", allow_missing=["fc_norm.*", "head.*"])
    assert_same_state(model, before)
    allowed = ["fc_norm.*", "head.*", "cls_token", "*.gamma"]
    report = load_checkpoint(model, tmp_path / "a.pth", allow_missing=allowed)
    assert len(report.missing) == 6
    assert torch.equal(model.cls_token, before["cls_token"])
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_another_size_says_which_tensors_differ(tmp_path):
    save_weights(small("finetune", num_classes=5).state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"tensors differ: cls_token must be \[1, 1, 48\], got \[1"
    ):
        load_checkpoint(small("finetune", embed_dim=48, num_classes=5), tmp_path / "a.pth")
    model = small("finetune", num_classes=9)
    match = (
        r"2 tensors differ: head.weight must be \[9, 16\], got \[5, 16\]; head.bias must be \[9\]"
    )
    with pytest.raises(ValueError, match=match):
        load_checkpoint(model, tmp_path / "a.pth")
    report = load_checkpoint(model, tmp_path / "a.pth", allow_missing=["head.*"])
    assert report.missing == ("head.weight", "head.bias")


def test_a_model_without_memory_takes_over_the_tensors(tmp_path):
    source = small()
    save_weights(source.state_dict(), tmp_path / "a.safetensors", dtype=torch.bfloat16)
    with torch.device("meta"):
        model = small()
        other = small("finetune")
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert model.pos_embed.dtype == torch.float32
    assert torch.equal(model.pos_embed, source.pos_embed.bfloat16().float())
    assert model.cls_token.requires_grad
    with pytest.raises(ValueError, match="on the meta device must find all its tensors"):
        load_checkpoint(other, tmp_path / "a.safetensors", allow_missing=["head.*", "fc_norm.*"])


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 broken"])
def test_unreadable_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read: \S") as caught:
        load_checkpoint(small(), tmp_path / name)
    assert caught.value.path == tmp_path / name
    assert caught.value.__cause__ is not None


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth: cannot be read: .*No such file"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no tensors by name but a list"):
        read_weights(tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is no training checkpoint but a list"):
        load_training_checkpoint(tmp_path / "list.pth")


class Code:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model": small().state_dict(), "hook": Code()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="cannot be read: Weights only load failed"):
        load_checkpoint(small(), tmp_path / "a.pth")


def test_convert(tmp_path):
    source = small()
    tied = source.state_dict() | {"tied": source.cls_token, "view": source.pos_embed[:, ::2]}
    torch.save({"module": tied | {"count": torch.tensor(3)}}, tmp_path / "a.pth")
    names = convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(names) == set(loaded) == set(tied) | {"count"}
    assert all(torch.equal(loaded[n], tied[n]) for n in tied)
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", dtype=torch.bfloat16)
    smaller = load_file(tmp_path / "b.safetensors")
    assert (smaller["tied"].dtype, smaller["count"].dtype) == (torch.bfloat16, torch.int64)
    with pytest.raises(ValueError, match=r"out must end in \.safetensors, got .*b\.pth"):
        convert(tmp_path / "a.pth", tmp_path / "b.pth")


def training_state(step=1):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": {"step": step},
        "data": {"epoch": 2, "position": 7},
        "rng": {"torch": torch.get_rng_state(), "list": [1, (2, None)], "key": b"x"},
        "config": '{"lr": 1.0}',
    }


def test_training_checkpoints_come_back_as_they_were(tmp_path):
    state = training_state()
    save_training_checkpoint(tmp_path / "last.pt", state)
    back = load_training_checkpoint(tmp_path / "last.pt")
    assert torch.equal(back["model"]["weight"], state["model"]["weight"])
    moment = back["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moment, state["optimizer"]["state"][0]["exp_avg"])
    assert back["rng"]["list"] == [1, (2, None)]
    assert back["config"] == state["config"]
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_training_checkpoints_hold_plain_data_only(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] must be a tensor, .*, got set"):
        save_training_checkpoint(tmp_path / "a.pt", {"a": [0, {1}]})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_training_checkpoint(path, training_state(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(CheckpointError) as caught:
                save_training_checkpoint(path, training_state(2))
        assert str(caught.value).startswith(f"{path}: cannot be written: ")
        assert "No space left" in str(caught.value)
    assert load_training_checkpoint(path)["schedule"]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    with pytest.raises(CheckpointError, match=r"nowhere/last\.pt: cannot be written"):
        save_training_checkpoint(tmp_path / "nowhere" / "last.pt", training_state())


def test_a_disk_that_fills_up_while_writing(tmp_path):
    """A limit on the size of a file fails in the middle of the write, as a full disk does."""
    script = textwrap.dedent("""
        import resource, signal, sys, torch
        from iv2.checkpoint import *
        path = sys.argv[1] + "/last.pt"
        save_training_checkpoint(path, {"step": 1})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for write in (
            lambda: save_training_checkpoint(path, {"step": torch.zeros(1_000_000)}),
            lambda: save_weights({"a": torch.zeros(1_000_000)}, sys.argv[1] + "/a.safetensors"),
        ):
            try:
                write()
            except CheckpointError as error:
                assert "cannot be written" in str(error), error
            else:
                raise SystemExit("no error")
        assert load_training_checkpoint(path) == {"step": 1}
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
