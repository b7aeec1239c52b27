"""Reinforcement learning from human feedback: a reward model, then PPO against it (Ouyang et al. 2022).

    phase 1: comparisons → reward model        phase 2: prompts → responses → scores → PPO

The reward model's run is in `reward_model/` under the output folder, the policy's run in the folder itself. Apart from
both phases, because each method has a file of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from loopos.config.paths import MODEL_DESCRIPTION
from loopos.config.rlhf import RlhfConfig
from loopos.evaluation.own_metrics import OwnMetrics
from loopos.methods.ppo import PpoTrainer
from loopos.methods.reward_model import RewardModelTrainer
from loopos.rl.workers.opening import check_installed
from loopos.storage.folder_lock import only_writer
from loopos.training.callbacks import CALLBACK, Callbacks
from loopos.training.progress import RunProgress
from loopos.training.run_state import FitResult


@dataclass(eq=False)
class ReinforcementTrainer:
    """Both phases, one after the other: `ReinforcementTrainer(config).train()`.

    `environment`: settings of the process, by name, for the log. `callbacks`, `metrics`: the user's own functions;
    metrics are of the second phase.
    """

    config: RlhfConfig
    _: KW_ONLY
    progress: RunProgress = field(default_factory=RunProgress)
    trust_remote_code: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    callbacks: Callbacks = field(default_factory=Callbacks)
    metrics: OwnMetrics = field(default_factory=OwnMetrics)

    def train(self, *, resume: bool = False) -> FitResult:
        """The result of the second phase, or of the first where a signal or a callback ended it. With `resume` a first
        phase that is done is not run again. Raises `UserError` for a mistake of the user's.
        """
        check_installed(self.config.rollout)
        # Both phases hold the folder between them too; the first process of several does, as in each phase.
        with only_writer(Path(self.config.data.output_dir)) if self._is_first else nullcontext():
            return self._phases(resume=resume)

    @property
    def _is_first(self) -> bool:
        return os.environ.get("RANK", "0") == "0"

    def _phases(self, *, resume: bool) -> FitResult:
        folder = Path(self.config.reward_model_dir)
        if not (resume and (folder / "model" / MODEL_DESCRIPTION).is_file()):
            self.progress.say("phase 1 of 2: reward model")
            phase = RewardModelTrainer(
                self.config.reward_model_config(),
                progress=self.progress,
                trust_remote_code=self.trust_remote_code,
                environment=self.environment,
                callbacks=self.callbacks,
            )
            result = phase.train(resume=resume)
            if result.interrupted or result.stopped_by == CALLBACK:
                return result
        self.progress.say("phase 2 of 2: policy")
        policy = PpoTrainer(
            self.config.ppo_config(),
            progress=self.progress,
            trust_remote_code=self.trust_remote_code,
            environment=self.environment,
            callbacks=self.callbacks,
            metrics=self.metrics,
        )
        return policy.train(resume=resume)
