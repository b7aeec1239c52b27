"""Sections of a config as frozen models: every key with its type, bounds, unit and default.

The sections that several methods share stand here; `keys` has the types of values, `checks` and each method's module
the checks across keys, `paths` those of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from loopos.config.diagnostics import Problem
from loopos.config.keys import (
    ClassWeights,
    Count,
    Duration,
    Fraction,
    Location,
    Metric,
    Optimizer,
    Pooling,
    Precision,
    Role,
    Schedule,
    Section,
    TargetScaling,
    Task,
    Text,
    Trainable,
    VariantName,
    Warmup,
)
from loopos.config.variants import FORMATS, LOSSES, TASK_LOSSES, TRACKERS

MAX_LINE_BYTES = 64 << 20
MAX_EXPANSION = 200


class ComputationSection(Section):
    """Which method runs."""

    mode: Literal["posttraining", "pretraining"] = Field(description="stage of training that the method belongs to")
    method: Text = Field(description="name of the method, as `loopos train --help` lists them")
    description: str = Field(default="", description="free text")


class SizesSection(Section):
    """The model's sizes (needed only for new weights and bare weights files)."""

    type: Literal["transformer"] = Field(default="transformer", description="kind of model")
    d_model: Count | None = Field(default=None, description="width of the hidden states (features)")
    num_heads: Count | None = Field(default=None, description="attention heads of a layer")
    num_layers: Count | None = Field(default=None, description="transformer layers")
    d_ff: Count | None = Field(default=None, description="width of the feed-forward layers (features)")
    vocab_size: Count | None = Field(default=None, description="token ids of the vocabulary")
    num_key_value_heads: Count | None = Field(
        default=None, description="key and value heads of a layer; as many as num_heads when absent"
    )


class ModelSection(SizesSection):
    """The model's sizes (needed only for new weights and bare weights files) and its head."""

    num_classes: Count | None = Field(
        default=None,
        description="classes of the head, at least 2, or 1 for regression; taken from the data when absent",
    )
    task: Task | None = Field(default=None, description="what the head predicts; taken from the labels when absent")
    pooling: Pooling = Field(
        default="auto",
        description="how the hidden states of a sequence become one vector; auto: last where transformers' own "
        "classifier of the architecture reads the last token, else mean",
    )
    head_init_std: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="standard deviation of a new head's weights; the model's initializer_range when absent",
    )
    labels: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="names of the classes, in order"
    )
    attention: Literal["auto", "packed", "padded"] = Field(default="auto", description="how sequences share a batch")
    class_weights: ClassWeights | Literal["balanced"] | None = Field(
        default=None, description="weight of each class in the loss (factor), or from the classes' counts"
    )
    label_smoothing: Fraction = Field(default=0.0, description="fraction of the target spread over all classes")
    loss: Annotated[str, VariantName(LOSSES, only=lambda row: "fine_tuning" in row.methods)] | None = Field(
        default=None, description="loss of the head (`loopos list losses`); that of the task when absent"
    )
    regression_loss: Literal["mse", "huber"] = Field(
        default="mse", description="loss of a regression head without model.loss"
    )

    def loss_of(self, task: str) -> str:
        """The name of the loss of a task."""
        return self.loss or TASK_LOSSES.get(task, self.regression_loss)

    huber_delta: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="error at which the Huber loss turns linear (standard deviations of the targets)"
    )
    target_scaling: TargetScaling = Field(
        default="auto",
        description="what a regression head learns: (value - mean) / deviation of the training rows, value / "
        "deviation, or the value; auto: value / deviation where the mean is at most a deviation from 0, else the first",
    )
    multi_label_threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="probability from which a label counts as predicted"
    )


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021) and their variants, under the names of peft."""

    rank: Count = Field(default=16, description="rank of the adapters (features)")
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=32.0, description="scale of the adapters; the factor is alpha / rank"
    )
    dropout: Fraction = Field(default=0.0, description="fraction of the adapters' inputs set to 0")
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] | Text = Field(
        default="all-linear",
        description="layers that get adapters: all-linear, a list of names, or a regular expression that matches whole "
        "names of modules",
    )
    exclude_modules: Annotated[list[Text], Field(min_length=1)] | Text | None = Field(
        default=None, description="layers that get none: a list of names, or a regular expression"
    )
    rank_pattern: dict[Text, Count] = Field(
        default={}, description="regular expression of the end of a module's name → its rank (features)"
    )
    alpha_pattern: dict[Text, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="regular expression of the end of a module's name → its alpha"
    )
    use_rslora: bool = Field(default=False, description="divide alpha by the root of the rank (rsLoRA)")
    use_dora: bool = Field(default=False, description="train the length of each row of a weight apart (DoRA)")
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora"] | Text = Field(
        default=True,
        description="start of the adapters: true (A random, B zero), gaussian, pissa (largest singular vectors of the "
        "weight), pissa_niter_N (the same by N iterations), olora (its QR decomposition)",
    )
    lora_plus_ratio: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="learning rate of B / learning rate of A (LoRA+)"
    )


class EarlyStoppingSection(Section):
    """When to stop before the last epoch."""

    patience: Count = Field(description="validations without a better metric before training stops")
    min_delta: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="gain that counts as better (unit of the metric)"
    )
    metric: Metric | None = Field(default=None, description="metric to monitor; training.metric when absent")


class TrainingSection(Section):
    """The optimizer, its schedule, what trains, and when to validate, save and stop."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(description="peak learning rate (change per unit gradient)")
    head_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="peak learning rate of the head; learning_rate when absent"
    )
    batch_size: Count = Field(default=16, description="sequences per process and forward pass")
    gradient_accumulation: Count = Field(default=1, description="forward passes per optimizer step")
    num_epochs: Count = Field(default=3, description="passes over the training data")
    max_steps: Count | None = Field(default=None, description="optimizer steps after which training ends")
    max_time: Duration | None = Field(
        default=None, description='time after which training ends (seconds, or "90s", "30m", "2h")'
    )
    optimizer: Optimizer = Field(default="adamw", description="rule of the weight updates")
    momentum: Fraction = Field(default=0.0, description="fraction of the last update kept (sgd and muon)")
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = Field(
        default=(0.9, 0.999), description="decay per step of the two moment averages (adam, adamw, muon's adamw part)"
    )
    epsilon: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description="added to the second moment's root (unit of the gradient)"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="fraction of each weight taken off per unit of learning rate"
    )
    schedule: Schedule = Field(default="cosine", description="shape of the learning rate over the steps")
    warmup: Warmup = Field(
        default=0.05, description="linear warmup: whole steps, or a fraction of all steps below 1; 0 is none"
    )
    minimum_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="last learning rate / peak learning rate"
    )
    num_cycles: Count = Field(default=1, description="cycles of cosine_restarts")
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="fraction of all steps in which warmup_stable_decay decays"
    )
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="factor on the learning rate at a plateau"
    )
    plateau_patience: Annotated[int, Field(ge=0)] = Field(
        default=2, description="validations without a better metric before that"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="L2 norm that gradients are clipped to; null is no clipping"
    )
    precision: Precision = Field(default="auto", description="number format of the forward and backward pass")
    gradient_checkpointing: bool = Field(default=False, description="compute activations twice to save memory")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where training runs")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=42, description="seed of all random numbers")
    trainable: Trainable = Field(default="all", description="which weights train")
    freeze_layers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="lowest layers, with the embeddings, that do not train; 0 freezes nothing"
    )
    unfreeze_step: Count | None = Field(
        default=None, description="optimizer step at which the frozen layers begin to train"
    )
    lora: LoraSection | None = Field(default=None, description="adapters of trainable: lora; its defaults when absent")
    keep_zeros: bool = Field(
        default=False, description="keep weights that are zero at the start at zero (pruned models)"
    )
    shuffle: bool = Field(default=True, description="new order of the rows in each epoch")
    max_length: Count | None = Field(
        default=None, description="longest sequence (tokens); the model's limit when absent"
    )
    router_aux_loss: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="weight of the loss that evens out how a mixture of experts uses its experts; 0 is none",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop", description="what happens at a NaN or infinite loss or gradient"
    )
    validate_every: Count | Literal["epoch", "never"] = Field(
        default="epoch", description="when to validate (optimizer steps)"
    )
    validate_at_start: bool = Field(default=True, description="validate before the first step too, as a baseline")
    early_stopping: EarlyStoppingSection | None = Field(default=None, description="when to stop early; null is never")
    metric: Metric | None = Field(
        default=None, description="metric that selects the best checkpoint; the task's own when absent"
    )
    save_every: Count | Literal["validation", "epoch", "never"] = Field(
        default="validation", description="when to save a checkpoint (optimizer steps)"
    )
    save_interval: Duration | None = Field(
        default=1800.0,
        description='longest time between two checkpoints (seconds, or "90s", "30m"), unless save_every is never; '
        "null is no limit",
    )
    keep_last: Count = Field(default=1, description="newest checkpoints that are kept")
    keep_best: bool = Field(default=True, description="keep the best checkpoint too, and export it")
    export_start: bool = Field(default=False, description="export the initial weights if no later validation is better")
    log_every: Count = Field(default=1, description="optimizer steps between two lines of the log")
    tensorboard: bool = Field(default=False, description="the same as trackers: [tensorboard]")
    trackers: list[Annotated[str, VariantName(TRACKERS)]] = Field(
        default=[], description="what records the numbers of events.jsonl too (`loopos list trackers`)"
    )

    @property
    def all_trackers(self) -> tuple[str, ...]:
        """The trackers, under either of the two keys."""
        return tuple(dict.fromkeys([*self.trackers, *(["tensorboard"] if self.tensorboard else [])]))


class ReadingSection(Section):
    """How data files are read, and how validation rows are split off."""

    plain_lines: ClassVar[str | None] = None
    """The role of a line in a .txt file with one row per line; None if such a file is refused."""

    source_keys: ClassVar[tuple[str, ...]] = ("training_data",)
    """The keys that may name the training rows, the method's own first."""

    row_keys: ClassVar[tuple[str, ...]] = ("training_data", "validation_data")
    """All keys that name rows."""

    format: Annotated[str, VariantName(FORMATS, only=lambda row: row.function is not None)] | None = Field(
        default=None,
        description="format of the rows, by its name in `loopos list formats`; found by their columns when absent",
    )
    encoding: Text | None = Field(
        default=None,
        description='encoding of text files, such as "cp1252"; UTF-8, or UTF-16 with a byte order mark, when absent',
    )
    max_line_bytes: Count = Field(default=MAX_LINE_BYTES, description="longest line of a data file (bytes)")
    max_expansion: Count = Field(
        default=MAX_EXPANSION,
        description="bytes that a compressed file may unpack to, for each byte of it; the first 64 MiB are free",
    )
    split_by: Literal["prompt", "row"] = Field(
        default="prompt",
        description="unit of the validation split: all rows of one prompt or text, or each row",
    )


class DataSection(ReadingSection):
    """Where the weights and rows come from, and where the run goes."""

    pretrained_weights: Location = Field(
        description='"smollm2-135m", "new", a folder, a .gguf, .safetensors or .bin file, or a hub id "org/name"'
    )
    adapter: Location | None = Field(
        default=None, description="PEFT adapter over the weights, or a run with one, that trains on (trainable: lora)"
    )
    tokenizer: Location | None = Field(
        default=None, description="folder, file or hub id of the tokenizer; the weights' own when absent"
    )
    training_data: Location = Field(description='file, folder, glob or hub id "org/name" of the rows to train on')
    validation_data: Location | None = Field(default=None, description="the same for validation; split off when absent")
    validation_share: Fraction = Field(
        default=0.1, description="fraction of the training rows split off for validation"
    )
    output_dir: Location = Field(description="folder of the run")
    columns: dict[Role, Text] = Field(default={}, description="column of each role; detected when absent")
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="what happens to a row that cannot be used"
    )
    on_truncation: Literal["truncate", "error"] = Field(
        default="truncate", description="what happens to a row over max_length"
    )
    streaming: bool = Field(
        default=False,
        description="read a hub id while it downloads, without storing it on disk; needs max_rows",
    )
    max_rows: Count | None = Field(default=None, description="largest number of rows to read")
    training_split: Text = Field(default="train", description="split of a hub id to train on")
    validation_split: Text | None = Field(default=None, description="split of a hub id to validate on")
    subset: Text | None = Field(default=None, description="subset of a hub id")


class MethodConfig(Section):
    """Base of a method's config: its sections are the fields; these methods check valid values."""

    section_order: ClassVar[tuple[str, ...]] = ("model", "computation", "training", "data")

    @property
    def phases(self) -> tuple[MethodConfig, ...]:
        """The configs of the trainings that the method runs, one after another; itself for a method that is one."""
        return (self,)

    @property
    def generates(self) -> bool:
        """Whether validation generates answers."""
        return False

    @property
    def num_generated(self) -> int:
        """Answers that a validation generates at most."""
        return 0

    @property
    def copies_start(self) -> bool:
        """Whether a run of one model holds a second copy of its weights, those of the start."""
        return False

    def check(self) -> Iterator[Problem]:
        """Contradictions between keys."""
        return iter(())

    def check_files(self) -> Iterator[Problem]:
        """Files and folders that are missing or of the wrong kind."""
        return iter(())

    def notes(self) -> list[str]:
        """Notes on keys that are set but have no effect."""
        return []


LANGUAGE_METRICS = ("loss", "accuracy")
"""Validation metrics of a language model: the loss of the trained tokens (nats), and the fraction of right answers
where answers are generated."""


class LanguageModelSection(SizesSection):
    """The model's sizes (needed only for new weights and bare weights files)."""

    attention: Literal["auto", "packed", "padded"] = Field(default="auto", description="how sequences share a batch")


class LanguageTrainingSection(TrainingSection):
    """The optimizer, its schedule, what trains, and when to validate, save and stop."""


class TextSourceSection(ReadingSection):
    """How rows of text are read, and where the run goes."""

    validation_data: Location | None = Field(
        default=None, description="file, folder, glob or hub id of the rows to validate on; split off when absent"
    )
    validation_share: Fraction = Field(
        default=0.1, description="fraction of the training rows split off for validation"
    )
    output_dir: Location = Field(description="folder of the run")
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="what happens to a row that cannot be used"
    )
    streaming: bool = Field(
        default=False,
        description="read a hub id while it downloads, without storing it on disk; needs max_rows",
    )
    max_rows: Count | None = Field(default=None, description="largest number of rows to read")
    training_split: Text = Field(default="train", description="split of a hub id to train on")
    validation_split: Text | None = Field(default=None, description="split of a hub id to validate on")
    subset: Text | None = Field(default=None, description="subset of a hub id")

    @property
    def has_validation(self) -> bool:
        """Whether there are validation rows."""
        return self.validation_data is not None or self.validation_split is not None or self.validation_share > 0


WHOLE_MATRICES = ("muon", "adafactor")
"""Optimizers whose update of a matrix needs all of its rows."""


StepFormatName: TypeAlias = Literal["think", "hashes", "lines"]


class StepFormatSection(Section):
    r"""How reasoning is written: opening, each step and the delimiter, closing, the marker, the answer."""

    opening: str = Field(default="<think>\n", description="text before the first step")
    closing: str = Field(default="</think>\n", description="text behind the last step's delimiter")
    delimiter: Text = Field(default="\n", description="text that ends each step")
    answer_marker: str = Field(default="", description="text before the answer")


class DistributedSection(Section):
    """How a run is distributed over processes; no effect with one process."""

    mode: Literal["auto", "replicate", "shard"] = Field(
        default="auto", description="replicate the model in each process, or shard it (FSDP2)"
    )
    shard_size: Count | None = Field(
        default=None,
        description="processes (or tensor-parallel groups) that shard one copy of the model; all when absent",
    )
    tensor_parallel: Count = Field(
        default=1,
        description="processes that split each layer and read the same rows; a divisor of the number of processes",
    )
    cpu_offload: bool = Field(
        default=False, description="keep weights, gradients and optimizer state in host memory (shard on CUDA)"
    )
    reshard_after_forward: bool = Field(
        default=True, description="free the gathered weights of a layer between its forward and backward pass"
    )
    timeout: Duration = Field(
        default=600.0, description='time after which a collective counts as hung (seconds, or "90s", "30m", "2h")'
    )
    silence: Duration = Field(
        default=20.0, description='time without a heartbeat after which a process counts as lost (seconds, or "90s")'
    )


def check_distributed(distributed: DistributedSection, optimizer: str) -> Iterator[Problem]:
    """Check the keys of sharding against each other and against the optimizer."""
    if distributed.mode == "shard" and optimizer in WHOLE_MATRICES:
        fields = ("training.optimizer", "distributed.mode")
        hint = "its update needs whole matrices, but a process holds only some rows"
        yield Problem(fields, f'{optimizer} with mode "shard"', 'sgd, adam or adamw, or mode "replicate"', hint)
    if distributed.tensor_parallel > 1 and optimizer in WHOLE_MATRICES:
        fields = ("training.optimizer", "distributed.tensor_parallel")
        actual = f"{optimizer} with tensor_parallel {distributed.tensor_parallel}"
        hint = "its update needs whole matrices, but a process holds only a part"
        yield Problem(fields, actual, "sgd, adam or adamw, or tensor_parallel 1", hint)
    if distributed.mode == "replicate":
        for name in ("shard_size", "cpu_offload", "reshard_after_forward"):
            actual = getattr(distributed, name)
            if actual != DistributedSection.model_fields[name].default:
                fields = (f"distributed.{name}", "distributed.mode")
                yield Problem(fields, f'{str(actual).lower()} with mode "replicate"', 'mode "shard" or "auto"')
