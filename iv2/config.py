"""What a run needs to be told, as frozen dataclasses; JSON in the run folder and in checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from iv2.config_json import flat, from_dict, to_dict
from iv2.data.dataset import ClipConfig
from iv2.models.audio import AudioConfig
from iv2.models.clip import ClipModelConfig
from iv2.models.language import LanguageConfig
from iv2.models.qformer import QFormerConfig
from iv2.models.stage2 import Stage2ModelConfig
from iv2.models.text import TextConfig
from iv2.models.vision_config import VisionConfig


@dataclass(frozen=True)
class SourceConfig:
    """One of several lists of a run."""

    # Folder of videos, or list of clips.
    path: str = ""
    # What the list is of; empty takes the rows' own kind.
    kind: Literal["", "image", "video", "audio", "audio_video", "text"] = ""
    # How often it is taken, beside those of the others; 0: as often as it is long.
    weight: float = 0.0
    # Frames of a clip; 0: as data.clip says. Of an image it is always one.
    num_frames: int = 0

    def __post_init__(self) -> None:
        _not_negative(self, "weight", "num_frames")


@dataclass(frozen=True)
class DataConfig:
    """Which clips are read, and how."""

    # Folder of shards (iv2 shard) or of videos, or list of clips (.jsonl, .json, .csv).
    path: str = ""
    # What the list of path is of; empty takes the rows' own kind.
    kind: Literal["", "image", "video", "audio", "audio_video"] = ""
    # Several lists, in the folder of path where one is given; each step takes a batch of one.
    sources: tuple[SourceConfig, ...] = ()
    # What is taken of each clip. Beside a video teacher of tubelets, a stage-1 student of single
    # frames gets every second one.
    clip: ClipConfig = field(default_factory=ClipConfig)
    # Clips in a step of one process.
    batch_size: int = 32
    # Worker processes that decode; 0 decodes in the training process.
    num_workers: int = 4
    # Memory for decoded clips, in bytes; 0 keeps none.
    cache_bytes: int = 0
    # Share of broken clips above which the run stops.
    max_bad_fraction: float = 0.1

    def __post_init__(self) -> None:
        _positive(self, "batch_size")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon for the matrices of blocks, and the schedule."""

    # Highest learning rate, for lr_batch clips a step; it grows with the global batch.
    lr: float = 1.5e-4
    # Learning rate at the end, for lr_batch clips a step.
    min_lr: float = 1e-5
    # Clips a step that lr and min_lr are meant for; 0 takes the rates as they are.
    lr_batch: int = 256
    # Decay of the two moments.
    betas: tuple[float, float] = (0.9, 0.98)
    # Added to the root of the second moment.
    eps: float = 1e-6
    # Weight decay; 1-D parameters, biases, position tables and the CLS token are spared.
    weight_decay: float = 0.05
    # Factor of the learning rate from a layer to the one before it.
    layer_decay: float = 1.0
    # Factor of the learning rate of the video encoder, in stage 3.
    vision_lr_scale: float = 1.0
    # Factor of the learning rate of the audio tower.
    audio_lr_scale: float = 1.0
    # Factor of the learning rate of the language model, in stage 3.
    lm_lr_scale: float = 1.0
    # Factor of the learning rate of the matrices of blocks, which Muon then updates; 0: AdamW does.
    muon_lr_scale: float = 0.0
    # Passes over the data.
    epochs: float = 301
    # Steps of the run; 0 counts epochs.
    steps: int = 0
    # Linear warm-up from 0, in epochs.
    warmup_epochs: float = 40
    # Linear warm-up from 0, in steps; 0 counts epochs.
    warmup_steps: int = 0
    # Largest global norm of the gradients; 0 does not clip.
    max_grad_norm: float = 3.0
    # Backward passes a step.
    accumulate: int = 1

    def __post_init__(self) -> None:
        scales = (f"{part}_lr_scale" for part in ("vision", "audio", "lm"))
        _positive(self, "lr", "accumulate", "layer_decay", *scales)
        _not_negative(self, "muon_lr_scale")
        if not self.steps and self.epochs <= 0:
            raise ValueError(f"OptimConfig: epochs must be positive, got {self.epochs}")


@dataclass(frozen=True)
class Stage1Config:
    """Masked distillation from one or two frozen teachers (iv2.models.teachers)."""

    # Teacher of clip_decoder and, by its pooling map, of the masks; empty for none.
    clip_teacher: str = "internvl-6b"
    # Its file.
    clip_teacher_path: str = ""
    # Teacher of mae_decoder; empty for none.
    mae_teacher: str = "videomae-g"
    # Its file.
    mae_teacher_path: str = ""
    # dtype of the teachers' weights and features.
    teacher_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the student sees: patches drawn by the first teacher's attention, the same random ones
    # in each frame, or random ones.
    mask: Literal["attention", "tube", "random"] = "attention"
    # Share of the patches that it does not see.
    mask_ratio: float = 0.8
    # Whether attention masks are drawn frame by frame or over the whole clip.
    mask_window: Literal["frame", "clip"] = "frame"
    # Student masks a teacher pass serves; the paper has 1.
    num_masks: int = 1
    # Memory for what the teachers made of clips that come again unchanged, as they do where neither
    # frames nor crops are drawn, bytes; 0: none.
    teacher_cache_bytes: int = 0
    # Weight of the loss on the layers of the first teacher.
    clip_weight: float = 1.0
    # Weight of the loss on its pooled vector.
    clip_pooled_weight: float = 1.0
    # Weight of the loss on the layers of the second teacher.
    mae_weight: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "num_masks")
        _not_negative(self, "teacher_cache_bytes")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"Stage1Config: mask_ratio must be in [0, 1), got {self.mask_ratio}")
        if not (self.clip_teacher or self.mae_teacher):
            raise ValueError("Stage1Config: clip_teacher or mae_teacher must be given, got neither")
        if self.mask == "attention" and not self.clip_teacher:
            raise ValueError(
                "Stage1Config: mask must be tube or random without a clip_teacher, got attention"
            )


@dataclass(frozen=True)
class Pairing:
    """A kind of media, a kind of caption, and the weights of the losses between them."""

    # What is looked at or listened to.
    media: Literal["vision", "audio", "audio_video"] = "vision"
    # What describes it.
    caption: Literal["visual", "audio", "speech", "av", "avs"] = "visual"
    # Weight of the contrastive loss.
    vtc: float = 1.0
    # Weight of the matching loss.
    vtm: float = 1.0
    # Weight of the masked-language loss.
    mlm: float = 1.0

    @property
    def name(self) -> str:
        """The losses' names begin with it."""
        return f"{self.media}_{self.caption}"


@dataclass(frozen=True)
class Stage2Config:
    """Contrastive, matching and masked-language learning."""

    # What is learnt from; a batch trains the pairings whose media it has.
    pairings: tuple[Pairing, ...] = (Pairing(),)
    # Projections and temperature.
    joint: Stage2ModelConfig = field(default_factory=Stage2ModelConfig)
    # Folder with the vocabulary (vocab.txt, or tokenizer.json) of the text tower.
    tokenizer: str = ""
    # Weights to start the video tower from, such as those of stage 1; empty for fresh ones.
    vision_init: str = ""
    # Weights to start the text tower from: BERT's.
    text_init: str = ""
    # Weights to start the audio tower from: BEATs'.
    audio_init: str = ""
    # Longest caption, in tokens with [CLS] and [SEP].
    max_tokens: int = 32
    # Share of the patches of a video that are not seen in training.
    mask_ratio: float = 0.8
    # The same of an image.
    image_mask_ratio: float = 0.5
    # Probability of masking a token for the masked-language loss.
    mlm_probability: float = 0.5
    # Modules that are not trained, such as vision_encoder.
    frozen: tuple[str, ...] = ()
    # Rows that the contrastive loss compares: those of all ranks, gathered or sent around a ring,
    # or each rank's own.
    gather: Literal["gather", "ring", "local"] = "gather"
    # exact: the gradient of the loss over all ranks; upstream: that of the released code, whose
    # part of the features is 1 / ranks of it.
    grad_mode: Literal["exact", "upstream"] = "exact"
    # Neighbouring rows among which hard negatives are drawn; 0: all of a rank.
    negatives_group: int = 0

    def __post_init__(self) -> None:
        names = [pairing.name for pairing in self.pairings]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"Stage2Config: pairings must be given once each, got {', '.join(names) or 'none'}"
            )
        for name in ("mask_ratio", "image_mask_ratio", "mlm_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"Stage2Config: {name} must be in [0, 1), got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class ClipStageConfig:
    """Contrastive learning of two towers, most of which is frozen."""

    # The text tower, and what joins the towers.
    joint: ClipModelConfig = field(default_factory=ClipModelConfig)
    # Folder with the vocabulary of the text tower; of a LLaMA also its config.json.
    tokenizer: str = ""
    # Weights of the video encoder: of stage 2, or of fine-tuning.
    vision_init: str = ""
    # Weights of the text tower, a file or a folder of transformers.
    text_init: str = ""
    # Weights of another CLIP model, whole or the trained part; they have the last word.
    clip_init: str = ""
    # What is trained: modules, parameters, or patterns such as *lora_*. All else is frozen, and
    # comes from the files.
    trained: tuple[str, ...] = ("vision_encoder.clip_projector", "temp")
    # Longest caption, in tokens with those for start and end, and the prompt.
    max_tokens: int = 77
    # Which captions are learnt from.
    caption: Literal["visual", "audio", "speech", "av", "avs"] = "visual"
    # Rows that the loss compares: those of all ranks, gathered or sent around a ring, or each
    # rank's own.
    gather: Literal["gather", "ring", "local"] = "gather"
    # exact: the gradient of the loss over all ranks; upstream: that of the released code, whose
    # part of the features is 1 / ranks of it.
    grad_mode: Literal["exact", "upstream"] = "exact"

    def __post_init__(self) -> None:
        if not self.trained:
            raise ValueError("ClipStageConfig: trained must name at least one module, got none")
        if self.max_tokens < 2:
            raise ValueError(
                f"ClipStageConfig: max_tokens must be at least 2, got {self.max_tokens}"
            )
        longest = self.joint.text.max_positions
        if self.joint.llama is None and self.max_tokens > longest:
            raise ValueError(
                f"ClipStageConfig: max_tokens must be at most max_positions {longest}, "
                f"got {self.max_tokens}"
            )


@dataclass(frozen=True)
class Stage3Config:
    """Next-token prediction through a language model."""

    # What reads the video's tokens; media_dim is that of the video encoder.
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    # The language model, its template, and what of it is trained.
    lm: LanguageConfig = field(default_factory=LanguageConfig)
    # What is learnt: the tokens of answers, or that the embeddings of a video are like the words of
    # its caption: of what is seen, and heard where there is sound.
    learns: Literal["next_token", "words"] = "next_token"
    # Last blocks of the video encoder that are left out.
    skip_blocks: int = 1
    # What is not trained beside the language model: modules or parameters, such as vision_encoder.
    frozen: tuple[str, ...] = ()
    # Longest conversation, in tokens and embeddings of the video; early rounds are left out.
    max_tokens: int = 1024
    # Most tiles of a video of high resolution, beside the whole; 0: the whole alone.
    tiles: int = 0
    # What the Q-Former reads: nothing, the system's message, or the first question.
    instruction: Literal["none", "system", "question"] = "none"
    # Folder with BERT's vocabulary for it.
    qformer_tokenizer: str = ""
    # Weights of the video encoder: of stage 2, or of stage 1.
    vision_init: str = ""
    # Weights of the audio tower: of stage 2, or BEATs'.
    audio_init: str = ""
    # Weights of the Q-Former with its queries, norm and projection: of another stage 3.
    qformer_init: str = ""
    # Weights of the language model: of another stage 3.
    lm_init: str = ""
    # Weights of another stage 3 whole: of a run, or a published file.
    chat_init: str = ""

    def __post_init__(self) -> None:
        _not_negative(self, "skip_blocks", "tiles")
        _positive(self, "max_tokens")


@dataclass(frozen=True)
class FinetuneConfig:
    """Supervised classification."""

    # Attributes of the clips to classify, a head each; empty takes the list's `label`.
    attributes: tuple[str, ...] = ()
    # Teacher to train (iv2.models.teachers) instead of the encoder; empty for the encoder.
    teacher: str = ""
    # Share of the target that is spread over all classes.
    label_smoothing: float = 0.1


@dataclass(frozen=True)
class TrainConfig:
    """A run."""

    # What is trained for.
    stage: Literal["stage1", "stage2", "clip", "stage3", "finetune"] = "stage1"
    # Folder of the run: config.json, log.jsonl, skipped.jsonl, checkpoints.
    run_dir: str = "runs/run"
    # Seed of weights, samples and masks.
    seed: int = 0
    # bfloat16: parameters and stream, with float32 masters; autocast: float32 parameters.
    precision: Literal["bfloat16", "autocast", "float32"] = "bfloat16"
    # Device; empty takes CUDA where there is one.
    device: str = ""
    # Weights to start from; empty for fresh ones.
    init: str = ""
    # Names, or patterns such as head.*, that the file of init may lack.
    init_allow_missing: tuple[str, ...] = ()
    # The encoder. Stage 1 sets its decoders to fit the teachers.
    model: VisionConfig = field(default_factory=VisionConfig)
    # The clips.
    data: DataConfig = field(default_factory=DataConfig)
    # The optimizer.
    optim: OptimConfig = field(default_factory=OptimConfig)
    # Masked distillation.
    stage1: Stage1Config = field(default_factory=Stage1Config)
    # The text tower of stage 2.
    text: TextConfig = field(default_factory=TextConfig)
    # The audio tower of stages 2 and 3; None has none.
    audio: AudioConfig | None = None
    # Contrastive, matching and masked-language learning.
    stage2: Stage2Config = field(default_factory=Stage2Config)
    # The CLIP variant of stage 2.
    clip: ClipStageConfig = field(default_factory=ClipStageConfig)
    # Next-token prediction.
    stage3: Stage3Config = field(default_factory=Stage3Config)
    # Supervised classification.
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    # Steps between log lines.
    log_every: int = 1
    # Steps between checkpoints; the last step has one too.
    save_every: int = 500
    # Checkpoints to keep.
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _positive(self, "log_every", "save_every", "keep_checkpoints")


# Fields that may change between a run and its continuation: they change no number.
FREE_FIELDS = frozenset(
    {
        "run_dir",
        "device",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "data.path",  # the loader compares the lists themselves
        "data.sources.path",
        "data.num_workers",
        "data.cache_bytes",
        "data.max_bad_fraction",
        "init",
        "stage2.vision_init",
        "stage2.text_init",
        "stage2.audio_init",
        "stage2.tokenizer",
        "clip.vision_init",
        "clip.text_init",
        "clip.clip_init",
        "clip.tokenizer",
        "stage3.lm.folder",
        "stage3.qformer_tokenizer",
        "stage3.vision_init",
        "stage3.audio_init",
        "stage3.qformer_init",
        "stage3.lm_init",
        "stage3.chat_init",
    }
)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            kind = type(config).__name__
            raise ValueError(f"{kind}: {name} must be positive, got {getattr(config, name)}")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            kind = type(config).__name__
            raise ValueError(f"{kind}: {name} must be >= 0, got {getattr(config, name)}")


def to_json(config: TrainConfig) -> str:
    """The resolved configuration of a run, as the text of its config.json."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(path: str | Path) -> TrainConfig:
    """Read a config.json.

    Raises:
        ValueError: The file is no such configuration; the path is named.
    """
    try:
        return from_dict(TrainConfig, json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:  # JSONDecodeError is one
        raise ValueError(f"{path}: {error}") from error


def differences(config: TrainConfig, other: dict[str, Any]) -> list[str]:
    """Fields, but for the free ones, in which a configuration differs from another's dict.

    Returns:
        "name value (other)" for each; what is wrong with the other, if it is no configuration.
    """
    try:
        # A field that is younger than the other run: its default is what was done before it.
        there = flat(to_dict(from_dict(TrainConfig, other)))
    except ValueError as error:
        return [str(error)]
    own = flat(to_dict(config))
    return [
        f"{name} {own.get(name)!r} (there {there.get(name)!r})"
        for name in sorted(own.keys() | there.keys())
        if re.sub(r"\.\d+\.", ".", name) not in FREE_FIELDS and own.get(name) != there.get(name)
    ]
