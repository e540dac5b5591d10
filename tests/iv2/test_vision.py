from __future__ import annotations

import math
import re
from pathlib import Path

import naive
import pytest
import torch
import torch.nn.functional as F

import iv2
import iv2kernels
from iv2.models.blocks import drop_path_scales, uniform_by_seed
from iv2.models.positions import guess_grid, resize_table, sincos_space_time
from iv2.models.teachers import build_teacher
from iv2.models.vision import VISION, VisionConfig, build_encoder, return_layers, vision_config

SMALL = {
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2,
    "img_size": 28,
    "num_frames": 4,
    "attn_pool_num_heads": 4,
    "clip_embed_dim": 24,
    "clip_teacher_embed_dim": 40,
    "clip_teacher_final_dim": 16,
    "mae_teacher_embed_dim": 32,
    "layer_scale": 0.5,
}
TOKENS = 16


def small(preset=None, **overrides):
    """A small encoder whose every parameter is random, in training mode."""
    counts = {"stage1": {"clip_return_layer": 2, "mae_return_layer": 2}}.get(preset, {})
    encoder = build_encoder("tiny", preset, **(SMALL | counts | overrides))
    randomize(encoder)
    return encoder.train()


@torch.no_grad()
def randomize(module):
    generator = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(1 + 0.2 * noise if "norm" in name and p.dim() == 1 else 0.3 * noise)


def clips(batch=2, frames=4, side=28, dtype=torch.float32):
    return torch.randn(batch, 3, frames, side, side).to(dtype)


def keep(batch=2, count=5, tokens=TOKENS):
    order = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order[:, :count].sort(1).values.int()


def published_models():
    text = (Path(__file__).parent / "published_keys.txt").read_text()
    for section in re.split(r"^\[", text, flags=re.M)[1:]:
        name, body = section.split("]", 1)
        shapes = {}
        for shape, names in re.findall(r"^([0-9x]+):((?:\s+[a-z]\S*)+)", body, flags=re.M):
            for pattern in names.split():
                times = re.search(r"\{(\d+)\}", pattern)
                for i in range(int(times[1]) if times else 1):
                    key = re.sub(r"\{\d+\}", str(i), pattern)
                    shapes[key] = tuple(map(int, shape.split("x")))
        yield name, shapes


@pytest.mark.parametrize(
    ("name", "shapes"), list(published_models()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_names_and_shapes_are_the_published_ones(name, shapes):
    with torch.device("meta"):
        model = build_encoder(*name.split()) if " " in name else build_teacher(name).encoder
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == shapes
    model.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize(
    ("size", "preset", "millions"),
    [
        ("s", "finetune", 23.352976),
        ("b", "distill", 102.252288),
        ("l", "clip", 308.929280),
        ("1b", "stage1", 1070.042752),
        ("1b", "stage2", 1049.117056),
        ("6b", "stage2", 6003.828096),
        ("6b", "finetune", 5942.044304),
    ],
)
def test_parameter_counts(size, preset, millions):
    with torch.device("meta"):
        encoder = build_encoder(size, preset)
    assert sum(p.numel() for p in encoder.parameters()) == round(millions * 1e6)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_naive_encoder_in_float64(gelu, masked):
    encoder = small(gelu=gelu).double()
    video, ids = clips(dtype=torch.float64), keep() if masked else None
    out = encoder(video, ids, layers=[0, 1, 2])
    layers, pooled, probs = naive.encode(encoder.state_dict(), encoder.config, video, ids)
    for i, expected in enumerate(layers):
        torch.testing.assert_close(out.layers[i], expected)
    torch.testing.assert_close(out.tokens, layers[-1])
    torch.testing.assert_close(out.pooled, pooled)
    torch.testing.assert_close(out.attention.double(), probs)


def test_gradients_match_the_naive_encoder_in_float64():
    encoder = small().double()
    video = clips(dtype=torch.float64)
    weights = {n: p for n, p in encoder.named_parameters()}
    tokens, pooled = encoder(video).tokens, encoder(video).pooled
    got = torch.autograd.grad(tokens.sin().sum() + pooled.sin().sum(), weights.values())
    layers, pooled, _ = naive.encode(weights, encoder.config, video)
    loss = layers[-1].sin().sum() + pooled.sin().sum()
    expected = torch.autograd.grad(loss, weights.values())
    for name, a, b in zip(weights, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def loss_and_gradients(encoder, video, ids, seeds=None):
    encoder.zero_grad()
    out = encoder.predict(video, ids, seeds=seeds)
    loss = sum(x.float().square().mean() for x in [*out.clip, *out.mae, out.final])
    loss.backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", ["same", "float32"])
def test_default_kernels_agree_with_the_reference(dtype, residual_dtype):
    encoder = small("stage1", residual_dtype=residual_dtype, drop_path=0.2)
    truth_of = small("stage1", drop_path=0.2).double()
    with torch.no_grad():
        for p, q in zip(encoder.to(dtype).parameters(), truth_of.parameters(), strict=True):
            q.copy_(p)
    video, ids, seeds = clips().to(dtype), keep(), torch.tensor([5, 6])
    _, truth = loss_and_gradients(truth_of, video.double(), ids, seeds)
    loss, got = loss_and_gradients(encoder, video, ids, seeds)
    with iv2kernels.use("reference"):
        expected, eager = loss_and_gradients(encoder, video, ids, seeds)
    torch.testing.assert_close(
        loss, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
    )
    floor = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    squares = torch.zeros(2)
    for name, gradient in truth.items():
        scale = gradient.norm().clamp_min(1e-6)
        error, eager_error = (((g[name] - gradient).norm() / scale).item() for g in (got, eager))
        squares += torch.tensor([error, eager_error]).square()
        assert error <= max(4 * eager_error, floor), f"{name}: {error:.2e}, eager {eager_error:.2e}"
    # one of a hundred parameters may be unlucky, all together may not
    together = (squares / len(truth)).sqrt()
    assert together[0] <= 1.5 * together[1], together


def test_float32_residual_stream_keeps_bfloat16_parameters():
    encoder = small(residual_dtype="float32").bfloat16()
    out = encoder(clips(), layers=[0])
    assert out.layers[0].dtype == out.tokens.dtype == torch.float32
    assert out.pooled.dtype == torch.bfloat16


def test_autocast_runs_and_reaches_every_parameter():
    encoder = small("stage1")
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder.predict(clips(), keep())
        loss = sum(x.float().square().mean() for x in [*out.clip, *out.mae, out.final])
    loss.backward()
    assert_all_but_decoder_norms_have_gradients(encoder)


def assert_all_but_decoder_norms_have_gradients(encoder):
    without = [n for n, p in encoder.named_parameters() if p.grad is None]
    assert all(re.search(r"decoder.*\.norm\.", n) for n in without), without


def test_every_parameter_gets_a_gradient():
    encoder = small("stage1", sep_pos_embed=True)
    loss_and_gradients(encoder, clips(), keep())
    assert_all_but_decoder_norms_have_gradients(encoder)
    for name in ("clip_projector.cross_attn.k_bias", "clip_projector.norm1_k.bias"):
        assert not encoder.get_parameter(name).grad.any()


def test_qk_norm_is_over_the_full_width():
    encoder = small().double()
    video = clips(dtype=torch.float64)
    before = encoder(video).tokens
    with torch.no_grad():  # per-head norms would not see one head's q growing
        encoder.blocks[0].attn.qkv.weight[:32] *= 10
    assert not torch.allclose(encoder(video).tokens, before, atol=1e-3)
    assert encoder.blocks[0].attn.q_norm.weight.shape == (64,)
    plain = small(qk_norm=False)
    assert plain.blocks[0].attn.q_norm is None
    assert plain(clips()).tokens.shape == (2, 1 + TOKENS, 64)


def test_decoders_add_positions_and_leave_the_norm_out():
    encoder = small("stage1").double()
    video, ids = clips(dtype=torch.float64), keep()
    c, state = encoder.config, encoder.state_dict()
    assert (c.clip_layers, c.mae_layers) == ((1, 2), (1, 2))
    out = encoder.predict(video, ids)
    layers, pooled, _ = naive.encode(state, c, video, ids)
    for k, i in enumerate(c.clip_layers):
        rows = torch.stack([torch.cat([torch.tensor([0]), j + 1]) for j in ids.long()])
        x = layers[i] + state["clip_pos_embed"][0][rows]
        w, b = state[f"clip_decoder.{k}.head.weight"], state[f"clip_decoder.{k}.head.bias"]
        torch.testing.assert_close(out.clip[k], x @ w.T + b)
        x = layers[i][:, 1:] + state["mae_pos_embed"][0][ids.long()]
        mlp = encoder.mae_decoder[k].head
        torch.testing.assert_close(
            out.mae[k],
            F.linear(F.gelu(F.linear(x, mlp[0].weight, mlp[0].bias)), mlp[2].weight, mlp[2].bias),
        )
    head = encoder.final_clip_decoder.head
    torch.testing.assert_close(out.final, F.linear(pooled, head.weight, head.bias))


def test_distillation_layers():
    assert return_layers(40, 6, 1) == (34, 35, 36, 37, 38, 39)
    assert return_layers(40, 6, 3.34) == (23, 26, 29, 33, 36, 39)


def test_checkpointing_changes_nothing():
    video, ids, seeds = clips(), keep(), torch.tensor([1, 2])
    plain = small("stage1", drop_path=0.4)
    saved = small("stage1", drop_path=0.4, checkpoint_num=2)
    loss, expected = loss_and_gradients(plain, video, ids, seeds)
    again, got = loss_and_gradients(saved, video, ids, seeds)
    assert torch.equal(loss, again)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_drop_path_statistics():
    rates = [0.0, 0.25, 0.5]
    for seeds in (None, torch.arange(4000)):
        scales = drop_path_scales(rates, 4000, torch.device("cpu"), seeds)
        assert scales.shape == (3, 2, 4000)
        assert (scales[0] == 1).all()
        for rate, row in zip(rates, scales, strict=True):
            assert set(row.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
            torch.testing.assert_close(row.mean(1), torch.ones(2), atol=0.06, rtol=0)
        both = (scales[2].bool().float() - 0.5).prod(0).mean()  # the branches are independent
        assert abs(both) < 0.02


def test_drop_path_belongs_to_the_sample():
    encoder, video = small(drop_path=0.6), clips(4)
    seeds = torch.tensor([3, 7, 7, 2**62])
    whole = encoder(video, seeds=seeds).tokens
    torch.testing.assert_close(encoder(video[2:], seeds=seeds[2:]).tokens, whole[2:])
    assert not torch.allclose(encoder(video, seeds=seeds + 1).tokens, whole)
    assert torch.equal(uniform_by_seed(seeds, 3)[:, 1], uniform_by_seed(seeds, 5)[:3, 2])
    first = naive.encode(encoder.eval().state_dict(), encoder.config, video)[0][-1]
    torch.testing.assert_close(encoder(video, seeds=seeds).tokens, first, atol=1e-4, rtol=1e-4)


def test_drop_path_scales_branches_as_written():
    encoder = small(drop_path=0.6).double()
    video, seeds = clips(dtype=torch.float64), torch.tensor([11, 12])
    state, c = encoder.state_dict(), encoder.config
    rates = torch.linspace(0, 0.6, 3).tolist()
    scales = drop_path_scales(rates, 2, torch.device("cpu"), seeds).double()[..., None, None]
    x = naive.patchify(video, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"])
    x = torch.cat([state["cls_token"].expand(2, -1, -1), x], 1) + state["pos_embed"]
    for i in range(3):
        x = naive.block(naive.under(state, f"blocks.{i}."), x, c.num_heads, "tanh", scales[i])
    torch.testing.assert_close(encoder(video, seeds=seeds).tokens, x)


def test_initialisation():
    published = {"init_std": 0.02, "layer_scale": 1e-5}
    encoder = build_encoder("tiny", "stage1", clip_return_layer=2, mae_return_layer=2, **published)
    for i, block in enumerate(encoder.blocks):
        scale = 0.02 / math.sqrt(2 * (i + 1))
        for weight, std in (
            (block.attn.qkv.weight, 0.02),
            (block.attn.proj.weight, scale),
            (block.mlp.fc1.weight, 0.02),
            (block.mlp.fc2.weight, scale),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert (block.ls1.gamma == 1e-5).all()
    assert encoder.clip_decoder[0].head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, p in encoder.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not p.any(), name
    assert not encoder.pos_embed[0, 0].any()
    assert torch.equal(encoder.mae_pos_embed[0], encoder.pos_embed[0, 1:])
    head = build_encoder("tiny", num_classes=300, **published).head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.05)


def test_sine_cosine_table():
    grid, dim = (3, 2, 4), 32
    table = sincos_space_time(dim, grid)
    for t, row, column in ((0, 0, 0), (2, 1, 3), (1, 0, 2)):
        code = []
        for width, place in ((8, t), (12, column), (12, row)):
            angles = [place / 10000 ** (i / (width // 2)) for i in range(width // 2)]
            code += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        got = table[(t * 2 + row) * 4 + column]
        torch.testing.assert_close(got, torch.tensor(code, dtype=torch.float64))


def test_table_interpolation_is_time_then_space():
    table = torch.randn(1, 1 + 4 * 9, 16)
    got = resize_table(table, (4, 3, 3), (8, 5, 6))
    body = table[0, 1:].view(4, 9, 16).permute(1, 2, 0)
    body = F.interpolate(body, size=8, mode="linear").permute(2, 1, 0)  # [8, C, 9]
    body = F.interpolate(body.reshape(8, 16, 3, 3), size=(5, 6), mode="bicubic")
    torch.testing.assert_close(got[0, 1:], body.flatten(2).transpose(1, 2).reshape(-1, 16))
    assert torch.equal(got[0, 0], table[0, 0])
    assert resize_table(table, (4, 3, 3), (4, 3, 3)) is table
    with pytest.raises(ValueError, match="resize_table: table must have 19 rows"):
        resize_table(table, (2, 3, 3), (4, 3, 3))


def test_grids_are_guessed_or_not_at_all():
    assert guess_grid(2048, (16, 24, 24)) == (8, 16, 16)
    assert guess_grid(1024, (8, 16, 16)) == (4, 16, 16)
    assert guess_grid(256, (16, 4, 4)) == (16, 4, 4)
    assert guess_grid(100, (4, 2, 2)) is None  # 4 frames of 5x5 or 25 of 2x2
    assert guess_grid(100, (4, 3, 3)) == (4, 5, 5)
    assert guess_grid(36, (4, 3, 3)) == (4, 3, 3)
    assert guess_grid(54, (4, 3, 3)) == (6, 3, 3)
    assert guess_grid(55, (4, 3, 3)) is None
    assert guess_grid(8 * 36, (8, 4, 4)) is None  # 8 frames of 6x6 or 18 of 4x4


@pytest.mark.parametrize("separate", [False, True])
def test_images_have_their_own_table_or_the_mean(separate):
    encoder = small("stage1", sep_image_video_pos_embed=separate)
    for prefix in ("", "clip_"):
        table = encoder.position((1, 2, 2), prefix)
        if separate:
            assert torch.equal(table, encoder.get_parameter(f"{prefix}img_pos_embed")[0])
        else:
            whole = encoder.get_parameter(f"{prefix}pos_embed")[0]
            assert torch.equal(table[0], whole[0])
            torch.testing.assert_close(table[1:], whole[1:].view(4, 4, -1).mean(0))
    assert encoder.predict(clips(frames=1)).clip[0].shape == (2, 5, 40)
    assert encoder.predict(clips(frames=1)).mae[0].shape == (2, 4, 32)


def test_separate_tables_add_up():
    encoder = small("stage1", sep_pos_embed=True)
    space, time = encoder.pos_embed_spatial[0], encoder.pos_embed_temporal[0]
    table = encoder.position((4, 2, 2))
    torch.testing.assert_close(table[1 + 2 * 4 + 3], time[2] + space[3])
    assert torch.equal(table[0], encoder.pos_embed_cls[0, 0])
    assert encoder.position((4, 2, 2), "mae_").shape == (16, 64)
    assert encoder.position((6, 3, 4)).shape == (73, 64)
    fresh = build_encoder("tiny", sep_pos_embed=True)
    assert set(fresh.pos_embed_cls.flatten().tolist()) == {0.0}


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(4, 28, 28), (6, 28, 28), (1, 42, 28), (3, 14, 56)]
)
def test_features_at_any_length_and_size(frames, height, width):
    encoder = small()
    video = torch.randn(2, 3, frames, height, width)
    got = encoder.features(video, layers=[0, -1])
    assert got.grid == (frames, height // 14, width // 14)
    assert list(got.tokens) == ["blocks.0", "blocks.2"]
    state = encoder.state_dict() | {"pos_embed": encoder.position(got.grid)[None]}
    layers, pooled, _ = naive.encode(state, encoder.config, video)
    torch.testing.assert_close(got.tokens["blocks.0"], layers[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.tokens["blocks.2"], layers[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.pooled, pooled, atol=1e-4, rtol=1e-4)


def test_features_of_visible_patches_without_the_pool():
    encoder = small(drop_path=0.9)
    ids = keep()
    got = encoder.features(clips(), [1], ids, pool=False)
    assert got.pooled is None
    assert got.tokens["blocks.1"].shape == (2, 6, 64)
    with pytest.raises(ValueError, match=r"layers must be in \[-3, 3\), got 3"):
        encoder.features(clips(), [3])


def test_frames_in_bytes_are_normalised():
    encoder = small()
    frames = torch.randint(0, 256, (2, 4, 28, 28, 3), dtype=torch.uint8)
    mean, std = torch.tensor(iv2kernels.IMAGENET_MEAN), torch.tensor(iv2kernels.IMAGENET_STD)
    video = ((frames / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    expected = encoder(video).tokens
    torch.testing.assert_close(encoder(frames).tokens, expected, atol=1e-4, rtol=1e-4)


def test_fine_tuning_head():
    encoder = small("finetune", num_classes=7, fc_drop_rate=0.5)
    video = clips()
    scores = encoder.eval().logits(video)
    normed = F.layer_norm(
        encoder(video).pooled, (24,), encoder.fc_norm.weight, encoder.fc_norm.bias
    )
    torch.testing.assert_close(scores, F.linear(normed, encoder.head.weight, encoder.head.bias))
    with pytest.raises(ValueError, match="num_classes must be positive for logits, got 0"):
        small().logits(video)


def test_weight_decay_spares_vectors_tables_and_cls():
    encoder = small("stage1", sep_pos_embed=True)
    spared = encoder.no_weight_decay()
    assert {"cls_token", "pos_embed_spatial", "mae_pos_embed_temporal"} <= spared
    assert {"blocks.0.ls1.gamma", "blocks.0.attn.proj.bias", "clip_decoder.1.norm.bias"} <= spared
    assert not any(n.endswith(("qkv.weight", "fc1.weight", "proj.weight")) for n in spared)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("embed_dim", 200),
        ("num_heads", 5),
        ("img_size", 225),
        ("drop_path", 1.0),
        ("gelu", "relu"),
        ("clip_return_layer", 41),
        ("attn_pool_num_heads", 7),
    ],
)
def test_configurations_that_cannot_be(what, value):
    with pytest.raises(ValueError, match=f"VisionConfig: {what} must be .*, got {value}"):
        VisionConfig(**{what: value})


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match="size must be one of tiny, s, b, l, 1b, 6b, got 7b"):
        vision_config("7b")
    with pytest.raises(ValueError, match=r"preset must be one of stage1, distill, .*, got stage9"):
        build_encoder("s", "stage9")
    with pytest.raises(AttributeError, match="nothing"):
        iv2.nothing  # noqa: B018
    assert iv2.build_encoder is build_encoder
    assert set(VISION) == {"tiny", "s", "b", "l", "1b", "6b"}


def test_videos_that_cannot_be():
    encoder = small()
    with pytest.raises(ValueError, match="patches of 14 pixels, got 4 frames of 30x30"):
        encoder(clips(side=30))
    with pytest.raises(
        ValueError, match=r"video must be \[B, T, H, W, 3\] uint8 or .*, got \[3, 28"
    ):
        encoder(torch.zeros(3, 28, 28))
