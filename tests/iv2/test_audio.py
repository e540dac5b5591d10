from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from iv2.checkpoint import load_checkpoint, save_weights
from iv2.data.audio import SoundConfig, cut, fbank, read_sound
from iv2.data.decode import DecodeError, Video
from iv2.data.synthetic import encode, synthesise
from iv2.models.audio import AUDIO, AudioConfig, AudioEncoder, relative_buckets

TINY = replace(AUDIO["tiny"], embed_dim=32, depth=2, num_heads=2, mlp_dim=48, patch_dim=24)


# ---- the tower


def naive(encoder, fbank):
    """The definition, in plain PyTorch, from the weights alone."""
    c, p = encoder.config, {n: t.detach() for n, t in encoder.state_dict().items()}

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    x = F.conv2d(fbank[:, None], p["patch_embedding.weight"], stride=c.patch_size)
    x = linear(norm(x.flatten(2).transpose(1, 2), "layer_norm"), "post_extract_proj")
    v, g = p["encoder.pos_conv.0.weight_v"], p["encoder.pos_conv.0.weight_g"]
    weight = torch.stack(
        [g[0, 0, k] * v[:, :, k] / v[:, :, k].norm() for k in range(c.conv_pos)], 2
    )
    place = F.conv1d(
        x.transpose(1, 2),
        weight,
        p["encoder.pos_conv.0.bias"],
        padding=c.conv_pos // 2,
        groups=c.conv_pos_groups,
    )
    x = norm(x + F.gelu(place[:, :, : x.shape[1]]).transpose(1, 2), "encoder.layer_norm")
    buckets = relative_buckets(x.shape[1], c.num_buckets, c.max_distance)
    for i in range(c.depth):
        name = f"encoder.layers.{i}"
        table = p[f"{name}.self_attn.relative_attention_bias.weight"]
        heads = []
        for h in range(c.num_heads):
            some = slice(h * (c.embed_dim // c.num_heads), (h + 1) * (c.embed_dim // c.num_heads))
            q, k, v = (linear(x, f"{name}.self_attn.{w}_proj")[..., some] for w in "qkv")
            gates = linear(q, f"{name}.self_attn.grep_linear")
            a, b = torch.sigmoid(gates[..., :4].sum(-1)), torch.sigmoid(gates[..., 4:].sum(-1))
            gate = a * (b * p[f"{name}.self_attn.grep_a"][0, h, 0, 0] - 1) + 2
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            scores = scores + gate[..., None] * table[buckets][..., h]
            heads.append(scores.softmax(-1) @ v)
        branch = linear(torch.cat(heads, -1), f"{name}.self_attn.out_proj")
        alpha = (2 * c.depth) ** 0.25
        x = norm(x * alpha + branch, f"{name}.self_attn_layer_norm")
        branch = linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")
        x = norm(x * alpha + branch, f"{name}.final_layer_norm")
    return x


@pytest.mark.parametrize("conv_pos", [16, 5])
def test_is_its_definition(conv_pos):
    encoder = AudioEncoder(replace(TINY, conv_pos=conv_pos)).double().eval()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 100, 64, dtype=torch.float64)
    y = encoder(x)
    assert y.shape == (2, 6 * 4, 32)  # what is left of a patch is cut off
    # the gates are in float32
    torch.testing.assert_close(y, naive(encoder, x), atol=1e-5, rtol=1e-5)


def test_ten_seconds_are_248_tokens():
    encoder = AudioEncoder(replace(TINY, depth=1)).eval()
    assert encoder(torch.zeros(1, SoundConfig().num_frames, 64)).shape[1] == 62 * 4


def test_both_forms_of_weight_norm_load_strictly(tmp_path):
    encoder = AudioEncoder(TINY)
    weights = encoder.state_dict()
    name = "encoder.pos_conv.0."
    newer = {
        n.replace(f"{name}weight_g", f"{name}parametrizations.weight.original0").replace(
            f"{name}weight_v", f"{name}parametrizations.weight.original1"
        ): t
        for n, t in weights.items()
    }
    assert newer.keys() != weights.keys()
    for content in (weights, newer):
        save_weights(content, tmp_path / "audio.pt")
        other = AudioEncoder(TINY)
        report = load_checkpoint(other, tmp_path / "audio.pt")
        assert report.missing == ()
        assert report.unexpected == ()
        for key, value in other.state_dict().items():
            assert torch.equal(value, weights[key])


def test_the_bias_is_one_table():
    encoder = AudioEncoder(TINY)
    first, second = (layer.self_attn.relative_attention_bias for layer in encoder.encoder.layers)
    assert first is second
    assert "encoder.layers.1.self_attn.relative_attention_bias.weight" in encoder.state_dict()


def test_published_shapes():
    with torch.device("meta"):
        keys = {n: tuple(t.shape) for n, t in AudioEncoder(AUDIO["beats"]).state_dict().items()}
    assert keys["patch_embedding.weight"] == (512, 1, 16, 16)
    assert keys["encoder.pos_conv.0.weight_g"] == (1, 1, 128)
    assert keys["encoder.pos_conv.0.weight_v"] == (768, 48, 128)
    assert keys["encoder.layers.11.self_attn.grep_a"] == (1, 12, 1, 1)
    assert keys["encoder.layers.0.self_attn.grep_linear.weight"] == (8, 64)
    assert keys["encoder.layers.0.self_attn.relative_attention_bias.weight"] == (320, 12)


def test_buckets_tell_directions_and_distances():
    buckets = relative_buckets(1000, 320, 800)
    assert buckets[0, 0] == 0
    assert buckets[5, 3] == 2
    assert buckets[3, 5] == 160 + 2
    assert buckets[900, 0] == 159
    assert (buckets[0].diff() >= 0).all()
    assert buckets.max() == 319


def test_tower_errors():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 768"):
        AudioConfig(num_heads=7)
    with pytest.raises(ValueError, match="num_mel_bins must be a multiple of patch_size, got 60"):
        AudioConfig(num_mel_bins=60)
    with pytest.raises(ValueError, match=r"fbank must be \[B, F, 64\] with F of at least 16, got"):
        AudioEncoder(TINY)(torch.zeros(2, 100, 128))


# ---- filter banks


def slow_fbank(wave, config):
    """Frame by frame, in float64."""
    window, step = config.sample_rate // 40, config.sample_rate // 100
    size = 1 << (window - 1).bit_length()

    def mel(f):
        return 1127 * math.log(1 + f / 700)

    low, high = mel(20), mel(8000)
    width = (high - low) / (config.num_mel_bins + 1)
    out = np.zeros((config.num_frames, config.num_mel_bins))
    wave = wave.double().numpy() * 2**15
    for t in range(min(config.num_frames, 1 + (len(wave) - window) // step)):
        x = wave[t * step : t * step + window].copy()
        x -= x.mean()
        x = x - 0.97 * np.concatenate([x[:1], x[:-1]])
        x *= (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1))) ** 0.85
        power = np.abs(np.fft.rfft(x, size)) ** 2
        for b in range(config.num_mel_bins):
            left = low + b * width
            total = 0.0
            for i in range(size // 2):
                m = mel(i * config.sample_rate / size)
                if left < m < left + 2 * width:
                    total += power[i] * (1 - abs(m - left - width) / width)
            out[t, b] = (math.log(max(total, np.finfo(np.float32).eps)) - 15.41663) / 13.11164
    return torch.from_numpy(out)


@pytest.mark.parametrize("bins", [64, 128])
def test_fbank_is_its_definition(bins):
    config = SoundConfig(num_mel_bins=bins, num_frames=12)
    wave = 0.3 * torch.randn(1600)  # eight frames
    found = fbank(wave, config)
    assert (found[8:] == 0).all()
    torch.testing.assert_close(found.double(), slow_fbank(wave, config), atol=1e-4, rtol=1e-4)


def test_fbank_of_nothing_is_zero():
    config = SoundConfig(num_frames=10)
    assert (fbank(torch.zeros(0), config) == 0).all()
    assert torch.isfinite(fbank(torch.zeros(16000), config)).all()


# ---- files


@pytest.fixture
def clip(tmp_path):
    frames = np.zeros((24, 32, 32, 3), np.uint8)
    t = np.arange(48_000) / 16_000
    wave = (0.5 * np.sin(2 * np.pi * np.where(t < 1.5, 400, 1600) * t)).astype(np.float32)
    path = tmp_path / "clip.mp4"
    encode(path, frames, wave, fps=8)
    return path


def loudest(wave):
    spectrum = torch.fft.rfft(wave).abs()
    return float(spectrum.argmax()) * 16_000 / len(wave)


def test_sound_of_a_part_of_a_video(clip):
    config = SoundConfig()
    whole = read_sound(clip, None, None, config)
    assert len(whole) == pytest.approx(48_000, abs=3000)
    assert 0.4 < float(whole.abs().max()) <= 1
    late = read_sound(clip, 2.0, 2.5, config)
    assert len(late) == pytest.approx(8000, abs=20)
    assert loudest(late) == pytest.approx(1600, abs=20)
    assert loudest(read_sound(clip, 0.5, 1.0, config)) == pytest.approx(400, abs=20)


def test_sound_files_and_other_rates(tmp_path):
    path = tmp_path / "tone.wav"
    tone = (0.5 * np.sin(2 * np.pi * 500 * np.arange(44_100) / 44_100) * 32767).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=44_100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.repeat(tone, 2)[None], "s16", "stereo")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    wave = read_sound(path, None, None, SoundConfig())
    assert len(wave) == pytest.approx(16_000, abs=50)
    assert loudest(wave) == pytest.approx(500, abs=5)


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("a.wav", "pcm_s24le", 96_000, "stereo"),
        ("a.flac", "flac", 44_100, "stereo"),
        ("a.mp3", "libmp3lame", 44_100, "stereo"),
        ("a.m4a", "aac", 22_050, "mono"),
        ("a.aac", "aac", 48_000, "stereo"),
        ("a.ogg", "flac", 32_000, "stereo"),
        ("a.opus", "libopus", 48_000, "mono"),
        ("a.webm", "libopus", 48_000, "stereo"),
        ("a.mkv", "ac3", 48_000, "5.1"),
        ("a.mov", "pcm_s16be", 8000, "mono"),
        ("a.avi", "libmp3lame", 48_000, "stereo"),
        ("a.mpg", "mp2", 48_000, "stereo"),
        ("a.ts", "aac", 48_000, "stereo"),
        ("a.wma", "wmav2", 44_100, "stereo"),
    ],
)
def test_any_container_becomes_16_khz_mono(tmp_path, name, codec, rate, layout):
    """Three seconds, 400 Hz and then 1600: all of it, and windows of it, at their times."""
    t = np.arange(3 * rate) / rate
    tone = np.sin(2 * np.pi * np.where(t < 1.5, 400, 1600) * t)
    wave = np.stack([0.5 * tone.astype(np.float32)] * av.AudioLayout(layout).nb_channels)
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 128_000
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.format, layout, rate, frame_size=size)
        frame = av.AudioFrame.from_ndarray(wave, "fltp", layout)
        frame.sample_rate, frame.pts = rate, 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    config = SoundConfig()
    whole = read_sound(path, None, None, config)
    assert whole.dtype == torch.float32
    assert whole.dim() == 1
    assert len(whole) == pytest.approx(3 * 16_000, abs=1800)  # coders add up to a tenth
    assert 0.2 < float(whole.abs().max()) <= 1
    for start, hertz in ((0.5, 400), (2.0, 1600)):
        part = read_sound(path, start, start + 0.5, config)
        assert len(part) == pytest.approx(8000, abs=20)
        assert loudest(part) == pytest.approx(hertz, abs=5)
    last = read_sound(path, 1.25, 1.75, config)  # the turn is in its middle, within 30 ms
    assert loudest(last[:3500]) == pytest.approx(400, abs=5)
    assert loudest(last[4500:]) == pytest.approx(1600, abs=5)


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.mpg"])
@pytest.mark.parametrize("late", [0.0, 0.25])
def test_sound_is_in_step_with_pictures_whose_clock_begins_late(tmp_path, name, late):
    """Both begin at 2 seconds by the file's clock, the sound perhaps later than the pictures."""
    path, rate = tmp_path / name, 48_000
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("mpeg1video" if name == "a.mpg" else "libx264", rate=25)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("mp2", rate=rate, layout="mono")
        for i in range(75):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 3 * i, np.uint8))
            frame.pts, frame.time_base = 50 + i, Fraction(1, 25)
            container.mux(pictures.encode(frame))
            block = np.zeros((1, rate // 25), np.float32)
            if i in (10, 60):  # clicks
                block[0, :100] = 0.9
            resampled = av.AudioFrame.from_ndarray((block * 32767).astype(np.int16), "s16", "mono")
            resampled.sample_rate = rate
            resampled.pts = round((2 + late) * rate) + i * rate // 25
            container.mux(sound.encode(resampled))
        container.mux([*pictures.encode(), *sound.encode()])
    with Video(path) as video:
        assert video.times[0] == 0
    wave = read_sound(path, None, None, SoundConfig())
    assert len(wave) == pytest.approx((3 + late) * 16_000, abs=1200)
    for start, click in ((0.0, 0.4), (2.0, 2.4)):
        part = read_sound(path, start, start + 1.0, SoundConfig())
        found = start + int((part.abs() > 0.3).nonzero()[0]) / 16_000
        assert found == pytest.approx(click + late, abs=0.03)  # the coder's delay is 10 ms


def test_without_sound_and_broken(tmp_path):
    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode())
    assert read_sound(path, None, None, SoundConfig()) is None
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DecodeError, match=r"broken\.mp4"):
        read_sound(tmp_path / "broken.mp4", None, None, SoundConfig())


def test_windows():
    config = SoundConfig(seconds=0.01)
    wave = torch.arange(1000.0)
    assert torch.equal(cut(wave, config), wave[:160])
    starts = {int(cut(wave, config, np.random.default_rng(i))[0]) for i in range(50)}
    assert len(starts) > 20
    assert max(starts) <= 840
    assert torch.equal(cut(wave[:100], config, np.random.default_rng(0)), wave[:100])


def test_sounds_of_the_toy_world_differ():
    config = SoundConfig(num_frames=98)
    rng = np.random.default_rng(0)
    waves = [torch.from_numpy(synthesise(s, 1.0, rng)) for s in ("hum", "hiss", "bell")]
    means = torch.stack([fbank(wave, config).mean(0) for wave in waves])
    assert torch.cdist(means, means)[~torch.eye(3, dtype=torch.bool)].min() > 0.5
