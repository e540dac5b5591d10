"""The one training loop: any stage whose ``forward(batch)`` gives named losses.

A step is: batch, losses, weighted sum, backward, clip, update; then a JSON line and, every so
often, a checkpoint. All state of a run is in the checkpoint, so a killed run goes on bitwise as if
it had not been; log lines after the checkpoint are dropped and written anew. It may go on in
another number of processes with the very same samples in each step, if a step has as many.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from iv2.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_training_checkpoint,
    save_training_checkpoint,
    save_weights,
)
from iv2.config import OptimConfig, TrainConfig, differences, to_json
from iv2.config_json import to_dict
from iv2.data.clips import Sample
from iv2.data.files import write_text
from iv2.data.mixed import join_states
from iv2.distributed import World
from iv2.distributed import world as join_world
from iv2.models.vision import VisionEncoder
from iv2.optim import Optimizer, Schedule, num_blocks, parameter_groups
from iv2.run_data import open_batches, read_sources
from iv2.run_folder import Log, Progress, checkpoints, latest_checkpoint, step_of
from iv2.stages.clip import ClipStage, build_clip_stage
from iv2.stages.finetune import build_finetune, find_classes
from iv2.stages.stage1 import build_stage1
from iv2.stages.stage2 import Stage2, build_stage2
from iv2.stages.stage3 import Stage3, build_stage3

__all__ = [
    "BatchSource",
    "NonFiniteLossError",
    "Result",
    "Stage",
    "build_stage",
    "latest_checkpoint",
    "run",
    "total_steps",
    "train",
]


class Stage(Protocol):
    """What the loop knows of a stage, a ``torch.nn.Module``."""

    loss_weights: dict[str, float]

    @property
    def trained(self) -> torch.nn.Module:
        """What is trained and saved."""

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says about the stage, in JSON values."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses by name."""


class BatchSource(Protocol):
    """What the loop knows of the data: ``iv2.data.loader.Batches``."""

    batch_size: int

    @property
    def position(self) -> int: ...

    @property
    def dataset(self) -> Any: ...

    def __next__(self) -> dict[str, Any]: ...

    @property
    def skipped(self) -> dict[str, str]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is NaN or infinite; the message names the clips of the step."""


@dataclass
class Result:
    """What ``train`` leaves."""

    # Folder of the run.
    run_dir: Path
    # Steps done, of the whole run.
    step: int
    # Step at which this call began, 0 unless it resumed.
    first_step: int
    # Losses of the last step, unweighted; empty when nothing was left to do.
    losses: dict[str, float] = field(default_factory=dict)


def train(
    stage: Any, batches: BatchSource, config: TrainConfig, world: World | None = None
) -> Result:
    """Train a stage in ``config.run_dir``, or go on with the run that is there.

    Args:
        stage: A module as ``Stage`` says, on the device of ``world``.
        batches: The data of this process.
        config: The run; ``config.stage`` and what belongs to a stage are not looked at.
        world: The processes; None: this one alone, on the CPU.

    Raises:
        NonFiniteLossError: A loss or gradient is not finite. Nothing was updated by that step.
        ValueError: run_dir holds a run of another configuration.
        CheckpointError: A checkpoint cannot be read or written; older ones are intact.
        OSError: Another file of the run cannot be written.
    """
    return _Run(stage, batches, config, world or World()).run()


def run(config: TrainConfig) -> Result:
    """Train as configured, from the data to the weights; under torchrun, in all its processes.

    Returns and raises what ``train`` does, and:

    Raises:
        ValueError: The data, a teacher or the weights of ``init`` do not fit the configuration.
        FileNotFoundError: There is no such data.
    """
    with join_world(config.device) as world:
        sources = read_sources(config)
        samples = [sample for source in sources for sample in source]
        torch.manual_seed(config.seed)  # the same weights in each process
        stage, config = build_stage(config, samples, world.device)
        is_new = latest_checkpoint(config.run_dir) is None
        if config.init and is_new:
            load_checkpoint(stage.trained, config.init, allow_missing=config.init_allow_missing)
        if isinstance(stage, ClipStage) or (isinstance(stage, Stage2 | Stage3) and is_new):
            stage.load_towers()  # what is frozen is in no checkpoint
        if isinstance(stage, Stage2 | ClipStage | Stage3) and is_new and world.is_main:
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)
            stage.tokenizer.save(config.run_dir)  # the run's own, so that its folder can be moved
        torch.manual_seed(config.seed + world.rank)
        with open_batches(config, sources, world) as batches:
            return train(stage, batches, config, world)


def build_stage(
    config: TrainConfig, samples: list[Sample], device: torch.device | str = "cpu"
) -> tuple[Any, TrainConfig]:
    """The stage of a configuration with fresh weights, and the configuration made complete.

    Args:
        config: ``model`` may leave out what the teachers or the classes decide.
        samples: Their attributes are the classes of supervised training.
        device: Where it runs.
    """
    if config.stage == "stage1":
        stage1 = build_stage1(config.model, config.stage1, device)
        return stage1, replace(config, model=stage1.student.config)
    if config.stage == "stage2":
        return build_stage2(config.model, config.text, config.audio, config.stage2, device), config
    if config.stage == "clip":
        if config.init:
            raise ValueError(
                "train: init must be empty for stage clip, whose files are clip.vision_init, "
                f"clip.text_init and clip.clip_init, got {config.init}"
            )
        return build_clip_stage(config.model, config.clip, device), config
    if config.stage == "stage3":
        if config.init:
            raise ValueError(
                "train: init must be empty for stage stage3, whose files are stage3.vision_init, "
                "stage3.audio_init, stage3.qformer_init, stage3.lm_init and stage3.chat_init, "
                f"got {config.init}"
            )
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        own, sound = config.stage3, config.audio
        return build_stage3(config.model, own, device, dtype=dtype, audio=sound), config
    classes = find_classes(samples, config.finetune.attributes)
    finetune = build_finetune(config.model, config.finetune, classes, device)
    if isinstance(finetune.model, VisionEncoder):
        config = replace(config, model=finetune.model.config)
    return finetune, config


def total_steps(optim: OptimConfig, num_samples: int, global_batch: int) -> tuple[int, int]:
    """Steps of the run, and those of its warm-up."""
    per_epoch = num_samples / global_batch
    total = optim.steps or max(1, int(optim.epochs * per_epoch))
    return total, optim.warmup_steps or min(total, int(optim.warmup_epochs * per_epoch))


class _Run:
    """State of a run in one process."""

    def __init__(self, stage: Any, batches: BatchSource, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.batches = config, world, batches
        self.run_dir = Path(config.run_dir)
        self.stage: Stage = stage
        if config.precision == "bfloat16":
            stage.trained.to(torch.bfloat16)
        stage.train()
        self.model = world.wrap(stage)  # before the masters are made: it sends rank 0's weights
        optim = config.optim
        global_batch = batches.batch_size * world.size * optim.accumulate
        self.samples_per_step = global_batch
        self.total, warmup = total_steps(optim, len(batches.dataset), global_batch)
        scale = global_batch / optim.lr_batch if optim.lr_batch else 1.0
        self.schedule = Schedule(optim.lr * scale, optim.min_lr * scale, warmup, self.total)
        named = list(stage.trained.named_parameters())
        self.optimizer = Optimizer(
            parameter_groups(
                named,
                depth=num_blocks(stage.trained),
                weight_decay=optim.weight_decay,
                layer_decay=optim.layer_decay,
                lr_scales={
                    "vision_encoder.": optim.vision_lr_scale,
                    "audio_encoder.": optim.audio_lr_scale,
                    "lm.": optim.lm_lr_scale,
                },
                muon_lr_scale=optim.muon_lr_scale,
            ),
            betas=optim.betas,
            eps=optim.eps,
        )
        self.step = 0
        self.num_skipped = 0

    def run(self) -> Result:
        first = self._prepare()
        losses: dict[str, float] = {}
        progress = Progress(self.total, enabled=self.world.is_main)
        main = self.world.is_main
        log_file = Log(self.run_dir / "log.jsonl", first) if main else contextlib.nullcontext()
        with log_file as log, progress:
            while self.step < self.total:
                row = self._one_step()
                losses = row["losses"]
                progress.show(row)
                if log is not None and self.step % self.config.log_every == 0:
                    log.write(row)
                if self.step % self.config.save_every == 0 or self.step == self.total:
                    self._write_skipped()  # what the stage could not use of the last batch
                    self._save()
        weights = self.run_dir / "model.safetensors"
        if main and (self.step > first or not weights.exists()):
            save_weights(self._weights(), weights)
        self.world.barrier()
        return Result(self.run_dir, self.step, first, losses)

    def _one_step(self) -> dict[str, Any]:
        """One update; returns the log line."""
        began = time.perf_counter()
        lr = self.schedule(self.step)
        accumulate = self.config.optim.accumulate
        sums: dict[str, Tensor] = {}
        seen: list[dict[str, Any]] = []
        data_s = 0.0
        for i in range(accumulate):
            asked = time.perf_counter()
            batch = self._next_batch()
            data_s += time.perf_counter() - asked
            seen.append({"paths": batch.get("paths", []), "seeds": batch["seeds"].tolist()})
            for name, loss in self._backward(batch, last=i == accumulate - 1).items():
                sums[name] = sums[name] + loss if name in sums else loss
        norm = self.optimizer.clip(self.config.optim.max_grad_norm)
        losses = self._checked(sums, norm, seen)
        grad_norm = losses.pop("grad_norm")
        self.optimizer.step(lr)
        self.step += 1
        seconds = time.perf_counter() - began
        weights = self.stage.loss_weights
        return {
            "step": self.step,
            "epoch": self.batches.position / len(self.batches.dataset),
            "loss": sum(weights[name] * value for name, value in losses.items()),
            "losses": losses,
            "lr": lr,
            "grad_norm": grad_norm,
            "samples_per_s": round(self.samples_per_step / seconds, 3),
            "data_s": round(data_s, 6),
            "step_s": round(seconds, 6),
        }

    def _backward(self, batch: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        """Gradients of one batch; returns its share of the losses of the step."""
        accumulate, config = self.config.optim.accumulate, self.config
        # Sums in bfloat16 would lose digits: masters collect each averaged gradient in float32.
        wait = not last and not self.optimizer.has_masters
        quiet = (
            self.model.no_sync()
            if wait and isinstance(self.model, DistributedDataParallel)
            else contextlib.nullcontext()
        )
        with quiet:
            with torch.autocast(
                self.world.device.type,
                dtype=torch.bfloat16,
                enabled=config.precision == "autocast",
            ):
                losses = self.model(batch)
            unknown = losses.keys() - self.stage.loss_weights.keys()
            assert not unknown, f"no weight for the losses {unknown}"
            weights = self.stage.loss_weights
            total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
            torch.autograd.backward(total / accumulate)
        self.optimizer.collect()
        return {name: loss.detach().float() / accumulate for name, loss in losses.items()}

    def _checked(
        self, losses: dict[str, Tensor], norm: Tensor, seen: list[dict[str, Any]]
    ) -> dict[str, float]:
        """Losses and gradient norm as means over the processes; stops where one is not finite."""
        names = [*losses, "grad_norm"]
        # One transfer a step. A NaN anywhere reaches every process, so that all stop together.
        values = self.world.mean(torch.stack([*losses.values(), norm.float()])).tolist()
        row = dict(zip(names, values, strict=True))
        if all(map(math.isfinite, values)):
            return row
        everything = [batch for rank in self.world.gather(seen) for batch in rank]
        clips = [
            {"path": path, "seed": seed}
            for batch in everything
            for path, seed in zip(batch["paths"], batch["seeds"], strict=True)
        ]
        if self.world.is_main:
            content = {"step": self.step + 1, **row, "clips": clips}
            write_text(self.run_dir / "nonfinite.json", json.dumps(content, indent=1) + "\n")
        named = "; ".join(f"{clip['path']} seed {clip['seed']}" for clip in clips[:16])
        more = f" and {len(clips) - 16} more in nonfinite.json" if len(clips) > 16 else ""
        raise NonFiniteLossError(
            f"train: loss must be finite, got {', '.join(f'{n} {v:g}' for n, v in row.items())} "
            f"at step {self.step + 1} in {self.run_dir}; its clips: {named}{more}"
        )

    def _next_batch(self) -> dict[str, Any]:
        try:
            batch = next(self.batches)
        finally:  # also when too many are broken
            self._write_skipped()
        return {
            key: value.to(self.world.device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }

    def _write_skipped(self) -> None:
        skipped = self.batches.skipped
        if len(skipped) == self.num_skipped:
            return
        self.num_skipped = len(skipped)
        rank = "" if self.world.is_main else f".{self.world.rank}"
        rows = [json.dumps({"path": path, "reason": reason}) for path, reason in skipped.items()]
        write_text(self.run_dir / f"skipped{rank}.jsonl", "".join(f"{row}\n" for row in rows))

    def _prepare(self) -> int:
        """Make the folder, or load the latest checkpoint in it; returns the step to start from."""
        if self.world.is_main:
            (self.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.world.barrier()
        path = latest_checkpoint(self.run_dir)
        if path is not None:
            self._restore(path)
        if self.world.is_main:
            write_text(self.run_dir / "config.json", to_json(self.config))
        return self.step

    def _restore(self, path: Path) -> None:
        state = load_training_checkpoint(path)
        try:
            ranks, rank = state["ranks"], self.world.rank
            there = state["config"]
            if len(ranks) == self.world.size:
                data = ranks[rank]["data"]
            else:  # the same samples a step may be divided otherwise
                data = join_states([each["data"] for each in ranks])
                step = state.get("samples_per_step", 0)
                if step != self.samples_per_step:
                    here = f"{self.samples_per_step} with {self.world.size} processes"
                    wrong = f"{here} (there {step or 'unknown'} with {len(ranks)})"
                    _check_same(path, "samples of a step", [wrong])
                own = to_dict(self.config)["data"]["batch_size"]
                there = there | {"data": there["data"] | {"batch_size": own}}
            _check_same(path, "configuration", differences(self.config, there))
            lacking, unknown = self.stage.trained.load_state_dict(state["model"], strict=False)
            _check_same(path, "weights", [*unknown, *sorted(set(lacking) ^ self._elsewhere)])
            self.optimizer.load_state_dict(state["optimizer"])
            self.batches.load_state_dict(data)
            if rank < len(ranks):  # a new process keeps the one that it was given
                torch.set_rng_state(ranks[rank]["rng"])
                if self.world.device.type == "cuda":
                    torch.cuda.set_rng_state(ranks[rank]["cuda_rng"], self.world.device)
            self.step = state["step"]
        except KeyError as error:
            raise CheckpointError(path, f"is no checkpoint of a run: no {error}") from error

    @property
    def _elsewhere(self) -> frozenset[str]:
        """Weights that the run does not save: frozen ones that have files of their own."""
        return getattr(self.stage, "elsewhere", frozenset())

    def _weights(self) -> dict[str, Tensor]:
        state, elsewhere = self.stage.trained.state_dict(), self._elsewhere
        return {name: tensor for name, tensor in state.items() if name not in elsewhere}

    def _save(self) -> None:
        mine: dict[str, Any] = {"data": self.batches.state_dict(), "rng": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            mine["cuda_rng"] = torch.cuda.get_rng_state(self.world.device)
        ranks = self.world.gather(mine)
        if not self.world.is_main:
            return
        path = self.run_dir / "checkpoints" / f"step_{self.step:08d}.pt"
        save_training_checkpoint(
            path,
            {
                "step": self.step,
                "model": self._weights(),
                "optimizer": self.optimizer.state_dict(),
                "config": to_dict(self.config),
                "stage": self.stage.description,
                "samples_per_step": self.samples_per_step,
                "ranks": ranks,
            },
        )
        kept = sorted(checkpoints(self.run_dir), key=step_of)
        for old in kept[: -self.config.keep_checkpoints]:
            old.unlink()


def _check_same(path: Path, what: str, wrong: list[str]) -> None:
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"train: {what} must equal that of {path}, got {', '.join(wrong[:8])}{more}; "
            "take another run_dir for another run"
        )
