"""Spoken words by espeak-ng, which the PyPI package espeakng-loader (GPL-3, an extra) brings."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_VOICES = ("en-us", "en-us+f2", "en-us+m3", "en-us+f4")
_WORDS_PER_MINUTE = (150, 190)
_SYNCHRONOUS, _RATE, _PITCH = 2, 1, 3  # of espeak's interface


# A process of its own: it finds modules as this one does.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from iv2.data.speech import _speak; _speak(json.loads(sys.argv[2]))"
)


@cache
def utterances(words: tuple[str, ...], sample_rate: int) -> dict[str, list[Floats]]:
    """Each word by four voices at two speeds, mono, peak 1, without silence at the ends.

    espeak draws random numbers as it speaks and keeps other state, even when it is started again:
    all is spoken in a fixed order by a new process, so that every call gives the same.

    Raises:
        RuntimeError: espeakng-loader is not installed, or espeak fails.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise RuntimeError(
            "toyworld: espeakng-loader must be installed for speech: pip install iv2[speech]"
        )
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), json.dumps(words)]
    child = subprocess.run(command, capture_output=True)
    if child.returncode:
        raise RuntimeError(f"toyworld: espeak must speak: {child.stderr.decode()[-500:].strip()}")
    head, _, samples = child.stdout.partition(b"\n")
    rate, *lengths = json.loads(head)
    waves = np.split(np.frombuffer(samples, np.int16), np.cumsum(lengths)[:-1])
    spoken = [_trimmed(wave, rate, sample_rate) for wave in waves]
    return {word: spoken[i :: len(words)] for i, word in enumerate(words)}


def _speak(words: Sequence[str]) -> None:
    """Write to stdout: JSON of the sample rate and of lengths, a newline, the 16-bit samples."""
    import espeakng_loader  # type: ignore[import-untyped]

    espeak = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    parts: list[NDArray[np.int16]] = []

    def collect(wave: Any, count: int, _: Any) -> int:
        if wave and count:
            parts.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    shorts = ctypes.POINTER(ctypes.c_short)
    kind = ctypes.CFUNCTYPE(ctypes.c_int, shorts, ctypes.c_int, ctypes.c_void_p)
    callback = kind(collect)  # kept: espeak holds no reference

    data = str(espeakng_loader.get_data_path()).encode()
    rate = espeak.espeak_Initialize(_SYNCHRONOUS, 0, data, 0x8000)
    if rate <= 0:
        raise RuntimeError(f"espeak does not start: {rate}")
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))  # it has seeded itself with the time
    espeak.espeak_SetSynthCallback(callback)
    spoken = []
    for voice in _VOICES:
        if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak has no voice {voice}")
        espeak.espeak_SetParameter(_PITCH, 50, 0)
        for speed in _WORDS_PER_MINUTE:
            espeak.espeak_SetParameter(_RATE, speed, 0)
            for word in words:
                parts.clear()
                text = word.encode() + b"\0"
                espeak.espeak_Synth(text, len(text), 0, 1, 0, 1, None, None)
                espeak.espeak_Synchronize()
                spoken.append(np.concatenate(parts))
    head = json.dumps([rate, *map(len, spoken)]).encode() + b"\n"
    sys.stdout.buffer.write(head + np.concatenate(spoken).tobytes())


def _trimmed(wave: NDArray[np.int16], rate: int, sample_rate: int) -> Floats:
    import torch
    import torch.nn.functional as F

    loud = np.flatnonzero(np.abs(wave.astype(np.int32)) > 300)
    wave = wave[loud[0] : loud[-1] + 1]
    x = torch.from_numpy(wave.astype(np.float32) / 2**15)
    # low-pass below the new Nyquist frequency, then linear interpolation: enough for words
    shrink = max(1.0, rate / sample_rate)
    taps = torch.hann_window(2 * round(2 * shrink) + 1, periodic=False)
    x = F.conv1d(x[None, None], (taps / taps.sum())[None, None], padding=len(taps) // 2)
    y = F.interpolate(x, size=round(len(wave) * sample_rate / rate), mode="linear")[0, 0]
    return np.asarray(y / y.abs().max().clamp(min=1e-6), np.float32)
