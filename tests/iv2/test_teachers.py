from __future__ import annotations

import naive
import pytest
import torch
import torch.nn.functional as F

from iv2.checkpoint import CheckpointError, save_weights
from iv2.models.positions import sinusoid
from iv2.models.teachers import TEACHERS, build_teacher, load_teacher, resize_video
from iv2kernels import distill_loss

IMAGE = {"embed_dim": 64, "depth": 3, "num_heads": 2, "attn_pool_num_heads": 4, "img_size": 28}
VIDEO = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 28, "num_frames": 8}
LAYERS = (1, 2)


@torch.no_grad()
def randomize(module):
    for name, p in module.named_parameters():
        noise = torch.randn_like(p)
        p.copy_(1 + 0.2 * noise if "norm" in name and p.dim() == 1 else 0.2 * noise)
    return module


def image_teacher(**overrides):
    teacher = build_teacher("teacher-image-tiny", LAYERS, **(IMAGE | overrides))
    return randomize(teacher).freeze()


def video_teacher(**overrides):
    teacher = build_teacher("teacher-video-tiny", LAYERS, **(VIDEO | overrides))
    return randomize(teacher).freeze()


def rows_of(tokens, ids):
    return tokens.gather(1, ids.long()[..., None].expand(-1, -1, tokens.shape[2]))


def ids_keep(count=5, tokens=16):
    return torch.stack([torch.randperm(tokens)[:count].sort().values for _ in range(2)]).int()


def test_published_targets():
    with torch.device("meta"):
        layers = {n: build_teacher(n).layers for n in TEACHERS}
        widths = {n: (build_teacher(n).embed_dim, build_teacher(n).pooled_dim) for n in TEACHERS}
    assert layers["internvl-6b"] == (42, 43, 44, 45, 46, 47)
    assert layers["videomae-g"] == (36, 37, 38, 39)
    assert layers["stage2-1b"] == (23, 26, 29, 33, 36, 39)
    assert widths["internvl-6b"] == (3200, 768)
    assert widths["videomae-g"] == (1408, 0)
    assert widths["stage2-1b"] == (1408, 768)


def test_image_teacher_sees_single_frames():
    teacher, video = image_teacher().double(), torch.randn(2, 3, 4, 28, 28, dtype=torch.float64)
    out = teacher(video)
    state, config = teacher.encoder.state_dict(), teacher.encoder.config
    frames = [naive.encode(state, config, video[:, :, t : t + 1]) for t in range(4)]
    ids = ids_keep()
    rows = out.rows(ids)
    assert rows.shape == (2, 6)
    for got, i in zip(out.tokens, LAYERS, strict=True):
        cls_token = torch.stack([f[0][i][:, 0] for f in frames]).mean(0)
        patches = torch.cat([f[0][i][:, 1:] for f in frames], 1)
        expected = torch.cat([cls_token[:, None], rows_of(patches, ids)], 1)
        torch.testing.assert_close(rows_of(got, rows), expected)
    torch.testing.assert_close(out.pooled, torch.stack([f[1] for f in frames]).mean(0))
    expected = torch.stack([f[2][:, 1:] for f in frames], 1)
    torch.testing.assert_close(out.attention.double(), expected)
    assert out.attention.shape == (2, 4, 4)


def test_clip_teacher_sees_the_whole_clip():
    options = IMAGE | {"num_frames": 4, "clip_embed_dim": 24, "mlp_ratio": 2}
    teacher = randomize(build_teacher("stage2-1b", LAYERS, **options)).freeze().double()
    video = torch.randn(2, 3, 4, 28, 28, dtype=torch.float64)
    out, ids = teacher(video), ids_keep()
    layers, pooled, probs = naive.encode(
        teacher.encoder.state_dict(), teacher.encoder.config, video
    )
    expected = torch.cat([layers[1][:, :1], rows_of(layers[1][:, 1:], ids)], 1)
    torch.testing.assert_close(rows_of(out.tokens[0], out.rows(ids)), expected)
    torch.testing.assert_close(out.pooled, pooled)
    torch.testing.assert_close(out.attention[:, 0].double(), probs[:, 1:])


def naive_mae(state, video, heads, depth, as_released):
    x = naive.patchify(video, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"])
    batch, tokens, dim = x.shape
    x = x + sinusoid(dim, tokens)
    layers = []
    for i in range(depth):
        s = naive.under(state, f"blocks.{i}.")
        y = F.layer_norm(x, (dim,), s["norm1.weight"], s["norm1.bias"], 1e-6)
        q, k, v = (y @ s["attn.qkv.weight"].T).chunk(3, -1)
        q, v = q + s["attn.q_bias"], v + s["attn.v_bias"]
        q, k, v = (naive.split(t, heads) for t in (q, k, v))  # [B, heads, N, D]
        if as_released:  # among the heads of each token, then flattened as [B, N, heads * D]
            mixed = torch.empty_like(q)
            for n in range(tokens):
                mixed[:, :, n] = naive.softmax_attention(q[:, :, n], k[:, :, n], v[:, :, n])[0]
            mixed = mixed.reshape(batch, tokens, dim)
        else:
            mixed = naive.join(naive.softmax_attention(q, k, v)[0])
        x = x + mixed @ s["attn.proj.weight"].T + s["attn.proj.bias"]
        y = F.layer_norm(x, (dim,), s["norm2.weight"], s["norm2.bias"], 1e-6)
        y = F.gelu(y @ s["mlp.fc1.weight"].T + s["mlp.fc1.bias"])
        x = x + y @ s["mlp.fc2.weight"].T + s["mlp.fc2.bias"]
        layers.append(x)
    layers[-1] = F.layer_norm(x, (dim,), state["norm.weight"], state["norm.bias"], 1e-6)
    return layers


@pytest.mark.parametrize("as_released", [False, True])
def test_video_teacher_matches_a_naive_one(as_released):
    published = {"qk_norm": False, "pos_table": "sinusoid"}
    teacher = video_teacher(as_released=as_released, **published).double()
    video = torch.randn(2, 3, 8, 28, 28, dtype=torch.float64)
    out = teacher(video)
    layers = naive_mae(teacher.encoder.state_dict(), video, 2, 3, as_released)
    for got, i in zip(out.tokens, LAYERS, strict=True):
        torch.testing.assert_close(got, layers[i])
    assert out.pooled is None
    assert out.attention is None
    ids = ids_keep()
    assert torch.equal(out.rows(ids), ids)


def test_sinusoid_table_is_interleaved():
    table = sinusoid(6, 5)
    for place, i in ((0, 0), (4, 1), (3, 2)):
        angle = torch.tensor(place / 10000 ** (2 * i / 6), dtype=torch.float64)
        torch.testing.assert_close(table[place, 2 * i], angle.sin())
        torch.testing.assert_close(table[place, 2 * i + 1], angle.cos())


def test_targets_go_into_distill_loss_by_row():
    out, ids = image_teacher()(torch.randn(2, 3, 4, 28, 28)), ids_keep()
    x, weight, bias = torch.randn(2, 6, 64, requires_grad=True), torch.ones(64), torch.zeros(64)
    loss = distill_loss(x, out.tokens[0], weight, bias, ids=out.rows(ids))
    target = rows_of(out.tokens[0], out.rows(ids))
    cosine = F.cosine_similarity(F.layer_norm(x, (64,)), target, dim=-1)
    torch.testing.assert_close(loss, (2 - 2 * cosine).mean())
    assert not out.tokens[0].requires_grad


@pytest.mark.parametrize("kind", ["image", "video"])
def test_small_teachers_train_supervised_then_load_frozen(kind, tmp_path):
    name, options = f"teacher-{kind}-tiny", IMAGE if kind == "image" else VIDEO
    teacher = build_teacher(name, LAYERS, **options, num_classes=5)
    if kind == "image":
        assert teacher.encoder.head.weight.abs().max() < 1e-3
    video = torch.randn(2, 3, 8, 28, 28)
    F.cross_entropy(teacher.logits(video), torch.tensor([1, 4])).backward()
    used = [n for n, p in teacher.named_parameters() if p.grad is not None]
    assert len(used) == len(list(teacher.parameters()))
    save_weights(teacher.state_dict(), tmp_path / "teacher.pth")
    frozen = load_teacher(
        name, tmp_path / "teacher.pth", dtype=torch.float32, layers=LAYERS, **options
    )
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    expected = teacher.freeze()(video)
    for a, b in zip(frozen(video).tokens, expected.tokens, strict=True):
        torch.testing.assert_close(a, b)
    again = build_teacher(name, LAYERS, **options, num_classes=5)
    again.load(tmp_path / "teacher.pth")
    torch.testing.assert_close(again.eval().logits(video), teacher.logits(video))


def test_published_formats_load_in_bfloat16(tmp_path):
    image, video = image_teacher(), video_teacher()
    tower = {f"visual.{n}": t for n, t in image.encoder.state_dict().items()}
    # an image model's patches have no time axis
    flat = "visual.patch_embed.proj.weight"
    tower |= {flat: tower[flat].squeeze(2), "text_projection": torch.zeros(3, 3)}
    torch.save({"module": tower}, tmp_path / "tower.pth")
    mae = {f"encoder.{n}": t for n, t in video.encoder.state_dict().items()}
    torch.save({"model": mae | {"decoder.head.weight": torch.zeros(2)}}, tmp_path / "mae.pth")
    a = load_teacher("teacher-image-tiny", tmp_path / "tower.pth", layers=LAYERS, **IMAGE)
    b = load_teacher("teacher-video-tiny", tmp_path / "mae.pth", layers=LAYERS, **VIDEO)
    clip = torch.randn(2, 3, 8, 28, 28)
    for loaded, source in ((a, image), (b, video)):
        got, expected = loaded(clip), source(clip)
        assert got.tokens[0].dtype == torch.bfloat16
        error = (got.tokens[0].float() - expected.tokens[0]).norm() / expected.tokens[0].norm()
        assert error < 0.05
    assert a(clip).attention.dtype == torch.float32


def test_stage2_file_of_four_frames_feeds_the_eight_frame_teacher(tmp_path):
    options = IMAGE | {"clip_embed_dim": 24, "mlp_ratio": 2}
    four = build_teacher("stage2-1b", LAYERS, **options, num_frames=4)
    state = {f"vision_encoder.{n}": t for n, t in four.encoder.state_dict().items()}
    torch.save({"module": state | {"temp": torch.ones(())}}, tmp_path / "stage2.pt")
    teacher = build_teacher("stage2-1b", LAYERS, **options, num_frames=8)
    report = teacher.load(tmp_path / "stage2.pt")
    assert list(report.reshaped) == ["pos_embed"]
    assert report.unexpected == ("temp",)


def test_other_sizes_are_resized():
    teacher = image_teacher()
    video = torch.randn(2, 3, 4, 42, 42)
    planes = F.interpolate(video.flatten(1, 2), size=(28, 28), mode="bicubic")
    expected = teacher(planes.view(2, 3, 4, 28, 28)).tokens[0]
    torch.testing.assert_close(teacher(video).tokens[0], expected)
    frames = torch.randint(0, 256, (2, 4, 42, 42, 3), dtype=torch.uint8)
    assert resize_video(frames, 28).shape == (2, 4, 28, 28, 3)
    assert resize_video(video, 42) is video


@pytest.mark.parametrize("kind", [image_teacher, video_teacher])
def test_frames_in_bytes(kind):
    frames = torch.randint(0, 256, (2, 8, 28, 28, 3), dtype=torch.uint8)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    video = ((frames / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    teacher = kind()
    expected = teacher(video).tokens[1]
    torch.testing.assert_close(teacher(frames).tokens[1], expected, atol=1e-3, rtol=1e-3)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of internvl-6b, .*, got clip"):
        build_teacher("clip")
    with pytest.raises(CheckpointError, match=r"absent\.pth: cannot be read"):
        load_teacher("teacher-image-tiny", tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="must have a multiple of 2 frames, got 3"):
        video_teacher()(torch.randn(1, 3, 3, 28, 28))
    save_weights(image_teacher().encoder.state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"cls_token must be \[1, 1, 128\], got \[1, 1, 64\]"):
        load_teacher("teacher-image-tiny", tmp_path / "small.pth")
