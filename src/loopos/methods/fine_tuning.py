"""Fine-tuning: a head over pooled hidden states, trained through the whole transformer.

    tokens → hidden states → pool → head → loss → gradients → update

Enters: a `FineTuningConfig`. Leaves: a run folder with checkpoints, events, a report and the trained model. After
Devlin et al. 2019 (section 3.2) and Hu et al.
2021 (LoRA). Left out: the loop (`training.fit`), the reading of data (`data.labelled`), what is done with the model
afterwards (`evaluation.predictor`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopos.config.faults import UserError
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.sections import LoraSection
from loopos.data.batches import Batch, StepBatches
from loopos.data.labelled import LabelledData, load_labelled
from loopos.data.tokens import Encoded, TokenReport, encode_labelled, longest
from loopos.evaluation.metrics import METRIC_DIRECTION
from loopos.evaluation.outputs import confusion, interpret, measure, outputs_of
from loopos.evaluation.report import write_report
from loopos.functional import losses
from loopos.models.adapters import add_lora, freeze_lower, merge_lora, save_lora
from loopos.models.backbone import Backbone
from loopos.models.heads import PooledModel
from loopos.models.load import Pretrained, Sizes, load_pretrained, save_json
from loopos.models.task_folder import save_task_model
from loopos.training import checkpoint
from loopos.training.distributed import World, join_world, leave_world
from loopos.training.events import EventLog
from loopos.training.fit import Fit, FitResult, Validation
from loopos.training.optimizers import OptimizerSet, OptimizerSettings
from loopos.training.precision import Masters, resolve
from loopos.training.progress import RunProgress
from loopos.training.random_states import seed_everything
from loopos.training.update import Update

_MAIN_METRIC = {"classification": "accuracy", "multi_label": "micro_f1", "regression": "mae"}
_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Targets:
    """Encoded labels as the loss takes them, and how to take regression outputs back: value = mean + std·output."""

    train: Tensor
    validation: Sequence[Any]
    mean: float = 0.0
    std: float = 1.0


@dataclasses.dataclass(frozen=True)
class TaskObjective:
    """The loss of a head: cross-entropy, binary cross-entropy, or (on standardised targets) squared or Huber
    error. One name: "loss".
    """

    model: PooledModel
    task: str
    class_weights: Tensor | None
    label_smoothing: float
    regression_loss: str
    huber_delta: float
    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"loss": 1.0})

    def counts(self, batch: Batch) -> Mapping[str, float]:
        assert batch.targets is not None
        if self.task == "classification":
            return {"loss": losses.class_weight_sum(batch.targets, self.class_weights)}
        return {"loss": float(batch.targets.numel())}

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        assert batch.targets is not None
        outputs = self.model(batch.ids, batch.layout, batch.token_types)
        if self.task == "classification":
            return {
                "loss": losses.cross_entropy_sum(
                    outputs, batch.targets, class_weights=self.class_weights, label_smoothing=self.label_smoothing
                )
            }
        if self.task == "multi_label":
            return {"loss": losses.binary_cross_entropy_sum(outputs, batch.targets)}
        if self.regression_loss == "huber":
            return {"loss": losses.huber_sum(outputs[:, 0], batch.targets, delta=self.huber_delta)}
        return {"loss": losses.squared_error_sum(outputs[:, 0], batch.targets)}


class FineTuner:
    """Adapts a pretrained language model to a task: `FineTuner(config).train()`."""

    def __init__(
        self, config: FineTuningConfig, *, progress: RunProgress | None = None, trust_remote_code: bool = False
    ) -> None:
        self.config, self.trust_remote_code = config, trust_remote_code
        self.progress = progress or RunProgress()
        self.run_dir = Path(config.data.output_dir)

    def train(self, *, resume: bool = False) -> FitResult:
        """Data, model, update, fit, export, report. Raises `UserError` for a mistake of the user's; nothing of an
        earlier run is overwritten without `resume`.
        """
        self.device = pick_device(self.config.training.device)
        world = join_world(self.device.type)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", world.local_rank)
        try:
            self.claim_folder(resume, world)
            seed_everything(self.config.training.seed, world.rank)
            self.load_data()
            self.build_model()
            fit = self.build_fit(world)
            result = fit.run(resume=resume)
            if world.is_first and not result.interrupted:
                self.export()
            world.wait()
            return result
        finally:
            leave_world(world)

    def claim_folder(self, resume: bool, world: World) -> None:
        """Makes the run folder and writes the resolved config; refuses a folder that holds a run, unless it is
        resumed.
        """
        if (self.run_dir / "events.jsonl").exists() and not resume:
            raise UserError(
                f"data.output_dir: {self.run_dir} holds a run already; go on with it by --resume, or name another folder"
            )
        if world.is_first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_json(self.run_dir / "config.json", self.config.model_dump(mode="json"))
        world.wait()

    def load_data(self) -> tuple[Pretrained, LabelledData]:
        """Reads, splits and tokenises the rows; says what was decided."""
        config = self.config
        data = load_labelled(config.data, config.model, seed=config.training.seed)
        model = config.model
        sizes = Sizes(
            model.d_model, model.num_heads, model.num_key_value_heads, model.num_layers, model.d_ff, model.vocab_size
        )
        self.pretrained = load_pretrained(
            config.data.pretrained_weights,
            sizes=sizes,
            tokenizer=config.data.tokenizer,
            trust_remote_code=self.trust_remote_code,
        )
        self.max_length = longest(
            self.pretrained.tokenizer,
            getattr(self.pretrained.model.config.get_text_config(), "max_position_embeddings", None),
            config.training.max_length,
        )
        self.data = data
        self.train_rows, self.train_tokens = self._encode(data.train)
        self.validation_rows, _ = self._encode(data.validation)
        self.targets = _targets(data)
        for sentence in [self.pretrained.said, *data.said, f"tokens: {self.train_tokens.said()}"]:
            self.progress.say(sentence)
        return self.pretrained, data

    def _encode(self, examples: Sequence[Any]) -> tuple[list[Encoded], TokenReport]:
        return encode_labelled(
            self.pretrained.tokenizer,
            examples,
            max_length=self.max_length,
            on_truncation=self.config.data.on_truncation,
        )

    def build_model(self) -> PooledModel:
        """Backbone and head, what trains, and the number format."""
        settings, section = self.config.training, self.config.model
        backbone = Backbone(self.pretrained.model, attention=section.attention)
        self.progress.say(f"attention: {backbone.path}" + (f" ({backbone.reason})" if backbone.reason else ""))
        later: list[nn.Parameter] = []
        if settings.trainable == "lora":
            lora = settings.lora or LoraSection()
            add_lora(
                backbone.model,
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                target_modules=lora.target_modules,
                seed=settings.seed,
            )
            self.lora = lora
        elif settings.trainable == "head":
            backbone.requires_grad_(False)
        elif settings.freeze_layers:
            later = freeze_lower(backbone.model, settings.freeze_layers)
        if settings.gradient_checkpointing:
            backbone.model.activation_checkpointing_enable()
        self.model = (
            PooledModel(backbone, num_outputs=self.data.space.num_outputs, pooling=section.pooling, seed=settings.seed)
            .to(self.device)
            .train()
        )
        self.precision = resolve(settings.precision, self.device)
        frozen = {id(parameter) for parameter in later}
        named = dict(self.model.named_parameters())
        self.trains_now = {name for name, parameter in named.items() if parameter.requires_grad}
        self.trains_later = (
            {name for name, parameter in named.items() if id(parameter) in frozen}
            if settings.unfreeze_step is not None
            else set()
        )
        half = torch.bfloat16 if self.precision == "bf16" else None
        self.masters = Masters(
            named,
            may_train=self.trains_now | self.trains_later,
            half=lambda name: half if name.startswith("backbone.") else None,
        )
        self.masters.set_training(self.trains_now)
        trained = sum(named[name].numel() for name in self.trains_now)
        self.progress.say(
            f"trains {trained:,} of {sum(p.numel() for p in named.values()):,} parameters in {self.precision} on {self.device}"
        )
        return self.model

    def build_fit(self, world: World) -> Fit:
        """Optimizer, update, batches and loop."""
        settings = self.config.training
        embeddings = {name for name, module in self.model.named_modules() if isinstance(module, nn.Embedding)}
        optimizer = OptimizerSet(
            OptimizerSettings(
                settings.optimizer,
                settings.learning_rate,
                settings.head_learning_rate,
                settings.momentum,
                settings.betas,
                settings.epsilon,
                settings.weight_decay,
            ),
            self.masters.parameters,
            head={"head.weight"},
            embeddings={f"{name}.weight" for name in embeddings},
        )
        update = Update(
            self.masters,
            optimizer,
            max_gradient_norm=settings.max_grad_norm,
            on_nonfinite=settings.on_nonfinite,
            world=world,
            autocast=(self.device.type, torch.float16) if self.precision == "fp16" else None,
        )
        batches = StepBatches(
            self.train_rows,
            self.targets.train,
            settings.batch_size,
            settings.gradient_accumulation,
            world.rank,
            world.size,
            settings.shuffle,
            settings.seed,
            self.device,
        )
        return Fit(
            run_dir=self.run_dir,
            settings=settings,
            update=update,
            batches=batches,
            objective=self.objective(),
            validation=self._validation(world) if self.config.validates and self.validation_rows else None,
            progress=self.progress,
            world=world,
            base=self._base(),
            unfreeze=(lambda: self.masters.set_training(self.trains_now | self.trains_later))
            if self.trains_later
            else None,
        )

    def objective(self) -> TaskObjective:
        """The loss of this config's head."""
        section = self.config.model
        weights = None
        if section.class_weights == "balanced":
            counts = torch.bincount(self.targets.train, minlength=self.data.space.num_outputs)
            weights = (len(self.targets.train) / (len(counts) * counts.clamp_min(1))).float().to(self.device)
        elif section.class_weights is not None:
            weights = torch.tensor(section.class_weights, device=self.device)
        return TaskObjective(
            self.model,
            self.data.space.task,
            weights,
            section.label_smoothing,
            section.regression_loss,
            section.huber_delta,
        )

    def _validation(self, world: World) -> Validation:
        settings = self.config.training
        metric = settings.metric or _MAIN_METRIC[self.data.space.task]
        early = settings.early_stopping
        watched = (early.metric if early is not None else None) or metric
        return Validation(
            lambda: self.validate(world), metric, METRIC_DIRECTION[metric], watched, METRIC_DIRECTION[watched]
        )

    def validate(self, world: World = World()) -> dict[str, float]:  # noqa: B008 (frozen)
        """Loss and metrics on the validation rows."""
        outputs = outputs_of(self.model, self.validation_rows, self.device, rank=world.rank, world=world.size)
        world.sum_tensors([outputs])
        return {
            "loss": self._validation_loss(outputs),
            **measure(
                self.data.space.task,
                self._meaning(outputs),
                self.targets.validation,
                threshold=self.config.model.multi_label_threshold,
            ),
        }

    def _validation_loss(self, outputs: Tensor) -> float:
        task, targets = self.data.space.task, self.targets
        if task == "classification":
            return float(losses.cross_entropy_sum(outputs, torch.tensor(targets.validation))) / len(outputs)
        if task == "multi_label":
            return float(losses.binary_cross_entropy_sum(outputs, torch.tensor(targets.validation))) / outputs.numel()
        standardised = (torch.tensor(targets.validation) - targets.mean) / targets.std
        return float(losses.squared_error_sum(outputs[:, 0], standardised)) / len(outputs)

    def _meaning(self, outputs: Tensor) -> np.ndarray:
        return interpret(self.data.space.task, outputs, target_mean=self.targets.mean, target_std=self.targets.std)

    def _base(self) -> str:
        """A fingerprint of the pretrained weights, so that a checkpoint of adapters is not laid over another base."""
        digest = hashlib.sha256(repr(self.pretrained.model.config.to_diff_dict()).encode())
        for name, parameter in self.pretrained.model.named_parameters():
            if ".lora_" not in name:
                digest.update(parameter.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def export(self) -> None:
        """Takes the best weights, or the last where there was no validation, and writes the model folder and the
        report.
        """
        best = checkpoint.best(self.run_dir / "checkpoints") if self.config.training.keep_best else None
        if best is not None:
            found = checkpoint.load(best)
            self.masters.load(found.tensors["weights"])
            self.progress.say(f"exporting the best weights, of step {found.step}")
        if self.data.space.task == "classification" and self.validation_rows:
            matrix = confusion(
                self._meaning(outputs_of(self.model, self.validation_rows, self.device)), self.targets.validation
            )
            with EventLog(self.run_dir / "events.jsonl") as log:
                log.write(
                    "confusion",
                    step=None,
                    metrics={"class_names": list(self.data.space.class_names), "matrix": matrix},
                    timing={},
                )
        backbone = self.model.backbone.model
        if self.config.training.trainable == "lora":
            save_lora(
                backbone,
                self.run_dir / "adapter",
                base=self.config.data.pretrained_weights,
                rank=self.lora.rank,
                alpha=self.lora.alpha,
                dropout=self.lora.dropout,
            )
            # Folded in fp32: a low-rank change is small beside the weights, and bf16 would round much of it away
            # before it is added.
            merge_lora(backbone.float())
        save_task_model(
            self.run_dir / "model",
            self.model,
            self.pretrained.tokenizer,
            self.description(),
            _FORMATS["bf16" if self.precision == "bf16" else "fp32"],
        )
        write_report(self.run_dir)
        self.progress.say(f"model: {self.run_dir / 'model'} · report: {self.run_dir / 'report.md'}")

    def description(self) -> dict[str, Any]:
        """What the model folder says of its task."""
        space = self.data.space
        return {
            "method": "fine_tuning",
            "task": space.task,
            "pooling": self.config.model.pooling,
            "class_names": list(space.class_names),
            "label_space": dataclasses.asdict(space),
            "target_mean": self.targets.mean,
            "target_std": self.targets.std,
            "threshold": self.config.model.multi_label_threshold,
            "max_length": self.max_length,
            "precision": "bf16" if self.precision == "bf16" else "fp32",
            "pretrained_weights": os.path.basename(self.config.data.pretrained_weights.rstrip("/")),
        }


def _targets(data: LabelledData) -> Targets:
    """Tensors of the encoded labels; regression targets standardised by the training rows' mean and standard
    deviation.
    """
    if data.space.task == "classification":
        return Targets(torch.tensor(data.train_targets), data.validation_targets)
    if data.space.task == "multi_label":
        return Targets(torch.tensor(data.train_targets, dtype=torch.float32), data.validation_targets)
    values = torch.tensor(data.train_targets, dtype=torch.float64)
    mean, std = float(values.mean()), float(values.std(unbiased=False))
    std = std if std > 0 else 1.0
    return Targets(((values - mean) / std).float(), data.validation_targets, mean, std)


def pick_device(name: str) -> torch.device:
    """ "auto" → CUDA, else MPS, else CPU. Raises `UserError` for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there[name]:
        raise UserError(
            f"training.device: given {name}, but torch {torch.__version__} sees no such device; use auto or cpu"
        )
    return torch.device(name)
