"""The rows that training would read, read before torch and transformers are imported.

Enters: a config. Leaves: nothing, or the faults of its rows: what cannot be read, labels of no class, chats without an
answer, pairs that are the same. What is found to be good is handed to training by `read_ahead`. Left out: hub ids and
data sets saved by `datasets`, which take longer to open than this may; what the tokenizer decides, as rows that are too
long: its class and its chat template come with transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loopos.config.begun import as_begun
from loopos.config.paths import MODEL_DESCRIPTION
from loopos.config.sections import MethodConfig
from loopos.data.column_check import sources_of
from loopos.data.read_ahead import read_first


def check_rows(config: MethodConfig) -> None:
    """Reads all files of rows that the config names. Raises `DataError` for their faults, `ConfigError` for keys that
    contradict the labels.
    """
    for phase in _phases(config):
        if all(open_reader().location.kind == "files" for _, open_reader, _ in sources_of(phase)):
            # As the methods do, so that they are handed what they ask for.
            _check_phase(as_begun(phase, Path(phase.data.output_dir)))


def _phases(config: Any) -> list[Any]:
    """The configs of the trainings that are to come: of rlhf the policy's alone where the reward model is there."""
    if config.computation.method != "rlhf":
        return [config]
    is_judged = (Path(config.reward_model_dir) / "model" / MODEL_DESCRIPTION).is_file()
    return [*([] if is_judged else [config.reward_model_config()]), config.ppo_config()]


def _check_phase(config: Any) -> None:
    """By the method's name, and with the imports of one method alone: they take longer than small files."""
    data, seed = config.data, config.training.seed
    match config.computation.method:
        case "fine_tuning":
            from loopos.data.labelled import check_for_task, load_labelled

            check_for_task(config, read_first(load_labelled, data, config.model, seed=seed).space)
        case "autoregressive":
            from loopos.data.corpus import load_corpus

            for source in (data.source, data.validation_data):
                if source is not None:
                    read_first(load_corpus, data, source)
        case "chain_of_thought":
            from loopos.data.supervised import load_supervised

            read_first(load_supervised, data, seed=seed)
        case "reward_model":
            from loopos.data.preference_data import load_comparisons

            read_first(load_comparisons, data, data.source, seed=seed)
        case "ppo":
            from loopos.data.preference_data import load_prompts

            read_first(load_prompts, data, data.source, seed=seed)
        case _:
            raise AssertionError(f"no rows are known of the method {config.computation.method}")
