"""What makes a run this run: what it learns from and what its outputs mean. A resumed run must have the same.

Enters: what a method learns from (weights, rows, tokenizer, labels, losses), each with the keys of the config that
decide it. Leaves: values for the checkpoint; of a checkpoint and a config, the sentences that refuse a run of another
meaning, by key, and one for each setting that may change and has. Left out: digests (`data.digest`), what a checkpoint
holds besides (`run_state.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from loopos.config.differences import shown
from loopos.config.sections import TrainingSection
from loopos.storage.durable import JSON
from loopos.training.update import Update

_MOST_CHARACTERS = 200
# Keys of the data that decide neither the training rows nor what they mean.
_NOT_OF_THE_ROWS = ("output_dir", "output_weights", "validation_data", "validation_split", "pretrained_weights")
_DIGITS = 12

Settings: TypeAlias = Mapping[str, tuple[Any, Any]]
"""Dotted key of the config → its value before and now, of those that differ."""


@dataclass(frozen=True)
class Trait:
    """One thing that must stay the same. `value`: JSON, or with `digest_of` a digest of what that names. `keys`: the
    keys of the config that decide it, the first one above all; "data." stands for all keys of the section `data`.
    `sentence`: how a difference is told, with {was} and {now}, where that is not "KEY: was …, is …".
    """

    value: JSON
    keys: tuple[str, ...]
    digest_of: str = ""
    sentence: str = ""

    def decided_by(self, changed: Settings) -> list[str]:
        """The changed keys that decide this."""
        return [key for key in changed if any(_covers(mine, key) for mine in self.keys)]

    def difference(self, theirs: object) -> str:
        """The sentence for a trait that differs though none of its keys does."""
        if self.sentence:
            return self.sentence.format(was=_short(theirs), now=_short(self.value))
        if self.digest_of:
            was, now = str(theirs)[:_DIGITS], str(self.value)[:_DIGITS]
            return f"{self.keys[0]}: {self.digest_of} differ from those of the run (digest {was}, now {now})"
        return f"{self.keys[0]}: was {_short(theirs)}, is {_short(self.value)}"


Identity: TypeAlias = Mapping[str, Trait]
"""Name → trait. The names stand in checkpoints."""


def setting(key: str, value: JSON) -> dict[str, Trait]:
    """A setting whose value in force must stay the same, under its key's name."""
    return {key: Trait(value, (key,))}


class RowCounts(Protocol):
    """What of a run's batches tells it from another run."""

    @property
    def num_rows(self) -> int: ...

    @property
    def rows_a_step(self) -> int: ...


def of_training(settings: TrainingSection, batches: RowCounts, update: Update) -> dict[str, Trait]:
    """What decides the numbers of a checkpoint and their order, whatever the method."""
    lora = settings.lora if settings.trainable == "lora" else None
    masters, shapes = update.masters, ("training.trainable", "training.freeze_layers", "training.lora", "model")
    by_step = ("training.batch_size", "training.gradient_accumulation", "distributed.tensor_parallel")
    return {
        "rows": Trait(batches.num_rows, (), sentence="training rows: were {was}, are {now}"),
        "rows_a_step": Trait(
            batches.rows_a_step,
            by_step,
            sentence="rows of a step (batch_size × gradient_accumulation × processes): were {was}, are {now}",
        ),
        "weights that train": Trait(
            f"{len(masters.parameters)} tensors of {masters.num_elements:,} numbers",
            shapes,
            sentence="weights that train: were {was}, are {now}",
        ),
        **setting("training.optimizer", settings.optimizer),
        **setting("training.seed", settings.seed),
        **setting("training.shuffle", settings.shuffle),
        **setting("training.trainable", settings.trainable),
        **setting("training.freeze_layers", settings.freeze_layers),
        **setting("training.router_aux_loss", settings.router_aux_loss),
        **(setting("training.lora.alpha", lora.alpha) if lora is not None else {}),
    }


@dataclass(frozen=True)
class Comparison:
    """A run to be resumed, held against its checkpoint. `refused`: why it is another one. `changed`: the settings that
    may change and have. `unknown`: names of traits that the checkpoint does not hold, being of an older version.
    """

    refused: list[str]
    changed: dict[str, tuple[Any, Any]]
    unknown: list[str]

    def sentences(self) -> list[str]:
        """A line for each changed setting, and one for what cannot be checked."""
        lines = [was_is(key, *values) for key, values in self.changed.items()]
        if self.unknown:
            lines.append(
                f"this run was begun by an older version, whose checkpoints do not hold {', '.join(self.unknown)}: "
                "whether these are the same cannot be checked"
            )
        return lines


def compare(saved: Mapping[str, Any], identity: Identity, changed: Settings) -> Comparison:
    """Holds a run against what its checkpoint saved. changed: the settings that differ from those of its session."""
    refused: list[str] = []
    causes: list[str] = []
    for name, trait in identity.items():
        keys = trait.decided_by(changed)
        if name not in saved:
            # Of an older version: what its config says must do.
            keys = [] if trait.digest_of else keys
        elif saved[name] == trait.value:
            continue
        causes += keys
        refused += [was_is(key, *changed[key]) for key in keys]
        if name in saved and (not keys or trait.digest_of):
            refused.append(trait.difference(saved[name]))
    kept = {key: values for key, values in changed.items() if key not in causes}
    return Comparison(list(dict.fromkeys(refused)), kept, [name for name in identity if name not in saved])


def was_is(key: str, was: object, now: object) -> str:
    """A changed setting in a sentence."""
    return f"{key}: was {_short(was)}, is {_short(now)}"


def values_of(identity: Identity) -> dict[str, JSON]:
    """What a checkpoint saves."""
    return {name: trait.value for name, trait in identity.items()}


def as_lines(sentences: Iterable[str]) -> str:
    """Sentences one below the other, set in."""
    return "".join(f"\n  {sentence}" for sentence in sentences)


def _covers(mine: str, key: str) -> bool:
    if mine == "data.":
        return key.startswith(mine) and key.split(".")[1] not in _NOT_OF_THE_ROWS
    return key == mine or key.startswith(f"{mine}.")


def _short(value: object) -> str:
    text = shown(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
