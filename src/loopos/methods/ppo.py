"""Proximal policy optimization: a language model learns to write what is scored high.

    prompts → responses → scores, reference, values → token rewards → GAE → shuffled minibatches → update

Enters: a `PpoConfig`. Leaves: a run folder with checkpoints, events, samples.jsonl, a report and the trained policy.
After Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022 and Huang et al. 2024. Left
out: the loop (`training.fit`), the four models (`models.roles`), what they say of responses (`evaluation.rollout`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from loopos.config.differences import as_begun
from loopos.config.figures import figure
from loopos.config.ppo import PpoConfig
from loopos.config.sections import LoraSection
from loopos.data.digest import prompts_digest
from loopos.data.preference_data import load_prompts
from loopos.data.preference_tokens import PreferenceEncoder
from loopos.data.reading import account
from loopos.data.tokens import longest
from loopos.evaluation.own_metrics import OwnMetrics
from loopos.evaluation.report import write_report
from loopos.evaluation.run_claim import claim
from loopos.functional.advantages import KlController
from loopos.models.folders import (
    OpenedReward,
    check_same_tokens,
    descriptions_together,
    export_language_model,
    open_reward_model,
)
from loopos.models.load import NUMBER_FORMATS, Pretrained, Sizes, fingerprint, load_pretrained
from loopos.rl.collector import (
    Collector,
    PolicyCheck,
    request_of,
    rollout_metrics,
    sampling_of,
    seeded,
    variance_explained,
)
from loopos.rl.experience import AdvantageSettings, Experience, ResponseBatch, ReusedForward, experience_of
from loopos.rl.monitors import Monitor, MonitorLimits
from loopos.rl.objective import PolicyState, PpoObjective
from loopos.rl.rewards import Rewards, judge_of
from loopos.rl.roles import Roles, build_roles
from loopos.rl.rollouts import RolloutBatches, RolloutPlan
from loopos.rl.workers.opening import DataParallel, RunView, check_installed, open_rollouts
from loopos.rl.workers.protocol import Request
from loopos.rl.workers.remote import RemoteRollouts
from loopos.storage.durable import explain_disk_full
from loopos.training.callbacks import Callbacks, preserve_random_states
from loopos.training.distributed import World
from loopos.training.fit import Fit
from loopos.training.identity import of_policy
from loopos.training.precision import resolve
from loopos.training.progress import RunProgress, write_samples
from loopos.training.run_state import FitResult
from loopos.training.session import session
from loopos.training.stopping import GUARD
from loopos.training.trained_weights import TrainedWeights, take_chosen
from loopos.training.update import build_update
from loopos.training.validation import Validation


@dataclass(eq=False)
class PpoTrainer:
    """Trains a policy on rewards: `PpoTrainer(config).train()`.

    `environment`: settings of the process, by name, for the log. `callbacks`, `metrics`: the user's own functions.
    """

    config: PpoConfig
    _: KW_ONLY
    progress: RunProgress = field(default_factory=RunProgress)
    trust_remote_code: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    callbacks: Callbacks = field(default_factory=Callbacks)
    metrics: OwnMetrics = field(default_factory=OwnMetrics)
    world: World = field(default=World(), init=False)

    @property
    def run_dir(self) -> Path:
        return Path(self.config.data.output_dir)

    def train(self, *, resume: bool = False) -> FitResult:
        """Prompts, models, fit, export, report; an earlier run stays without `resume`. Raises `UserError`."""
        check_installed(self.config.rollout)
        with (
            session(self.config.training, self.config.distributed) as (self.device, self.world),
            claim(self.run_dir, self.world, resume=resume, note=self.progress.warn),
        ):
            self.config = as_begun(self.config, self.run_dir)
            self.load_data()
            self.build_models()
            with closing(self.engine):
                self.fit = self.build_fit()
                self.fit.open(resume=resume)
                self.result = self.fit.run()
            if not self.result.interrupted:
                self.export()
            self.world.wait()
        return self.result

    def load_data(self) -> None:
        """Reads the prompts, loads policy and reward model, and tokenises; says what was decided."""
        config, data, settings = self.config, self.config.data, self.config.training
        self.data = load_prompts(data, data.source, seed=settings.seed)
        self.pretrained: Pretrained = load_pretrained(
            data.pretrained_weights,
            causal=True,
            sizes=Sizes.of(config.model, max_length=settings.max_length),
            tokenizer=data.tokenizer,
            trust_remote_code=self.trust_remote_code,
        )
        self.tokenizer = self.pretrained.tokenizer
        self.opened_rewards: list[OpenedReward] = []
        for place in data.reward_models:
            self.opened_rewards.append(open_reward_model(place))
            check_same_tokens(self.tokenizer, self.opened_rewards[-1].tokenizer, f"data.reward_model: {place}")
        positions = getattr(self.pretrained.model.config.get_text_config(), "max_position_embeddings", None)
        whole = longest(self.tokenizer, positions, settings.max_length)
        room = None if whole is None else whole - config.generation.max_new_tokens
        limit = min((each for each in (room, data.max_prompt_tokens) if each is not None), default=None)
        self.encoder = PreferenceEncoder(data, self.tokenizer, max_length=limit)
        self.prompts, self.tokens = self.encoder.prompts(self.data.train)
        chosen = self.data.validation[: config.evaluation.prompts] if config.validates else []
        self.validation_prompts: list[list[int]] = self.encoder.prompts(chosen)[0] if chosen else []
        tokens = f"tokens: {self.tokens.summary()}"
        self.progress.say(self.pretrained.summary, *self.data.summary, self.encoder.template.summary, tokens)

    def build_models(self) -> Roles:
        """Policy, reference, reward and value model; what trains; the engine that generates with the same weights."""
        config, settings = self.config, self.config.training
        self.precision = resolve(settings.precision, self.device)
        scored_by = [fingerprint(opened.model.backbone.model) for opened in self.opened_rewards]
        self.base = ", rewards ".join([self.pretrained.fingerprint, *scored_by])
        self.roles = build_roles(
            self.pretrained,
            self.opened_rewards,
            settings,
            value_model=settings.value_model,
            temperature=config.generation.temperature,
            attention=config.model.attention,
        )
        self.reward_description = descriptions_together([opened.description for opened in self.opened_rewards])
        # What became an adapter of the policy's trunk needs its own weights no more.
        self.opened_rewards.clear()
        self.roles.cast_frozen(NUMBER_FORMATS["bf16"] if self.precision == "bf16" else None)
        self.trained = TrainedWeights(
            self.roles.actor_critic,
            settings,
            precision=self.precision,
            device=self.device,
            world=self.world,
            initially_frozen=self.roles.initially_frozen,
            half_under=("policy.", "critic.backbone."),
            frozen=self.roles.frozen,
        )
        stops = self.encoder.template.stop_tokens
        self.sampling = sampling_of(config.generation, stop_token_ids=stops, seed=settings.seed)
        with self.trained.whole():
            self.engine = open_rollouts(
                config,
                self.pretrained,
                data_parallel=DataParallel(
                    rank_and_size=self.world.data_parallel, gather=self.world.gather_data_parallel
                ),
                run=RunView(lambda: self.fit.position.step, lambda: self.batches.plan.iterations, self.asked),
                say=self.progress.say,
                trust_remote_code=self.trust_remote_code,
            )
        self.progress.say(self.roles.summary, self.trained.summary(), self.engine.summary)
        return self.roles

    def build_fit(self) -> Fit[ResponseBatch]:
        """Rewards, rollouts, objective, optimizer and loop."""
        config, settings, world, actor_critic = self.config, self.config.training, self.world, self.roles.actor_critic
        rewards = Rewards.of(self.roles.reward, self.reward_description, config.reward, config.generation, self.device)
        plan = RolloutPlan.of(
            settings, num_prompts=len(self.prompts), rank=world.data_parallel[0], world=world.data_parallel[1]
        )
        # In one process, and a format that does not run in steps alone, judging is the first step's forward pass.
        kept = ReusedForward(plan.batches_of) if world.size == 1 and self.precision != "fp16" else None
        words, gather = self.encoder.words, world.gather_data_parallel
        self.collector = Collector(
            self.engine, self.roles, rewards, device=self.device, origins=words, reused=kept, gather=gather
        )
        self.controller = KlController(settings.kl_coefficient, target=settings.kl_target, horizon=settings.kl_horizon)
        self.guards = Monitor(MonitorLimits(**config.guards.model_dump(exclude={"stop"})))
        self.objective = PpoObjective.of(settings, actor_critic, reused=kept)
        self.batches = RolloutBatches(plan, self.collect, self.device)
        self.check = self._check() if self.validation_prompts else None
        ahead = self.engine if isinstance(self.engine, RemoteRollouts) else None
        self.state = PolicyState(self.batches, self.controller, self.objective, self.guards, self.check, ahead)
        values = {name for name, _ in actor_critic.named_parameters() if name.startswith("critic.")}
        optimizer = settings.model_copy(update={"head_learning_rate": settings.value_learning_rate})
        return Fit(
            run_dir=self.run_dir,
            config=self.config,
            settings=settings,
            update=build_update(
                actor_critic, self.trained.master_weights, optimizer, self.precision, world, head=values
            ),
            batches=self.batches,
            objective=self.objective,
            validation=self._validation() if self.check is not None else None,
            progress=self.progress,
            callbacks=self.callbacks,
            world=world,
            identity=of_policy(self.config, self.prompts, self.encoder, base=self.base),
            facts=self._facts(plan.iterations),
            unfreeze=self.trained.unfreeze if self.trained.later else None,
            planned_steps=plan.iterations * self.batches.steps_an_epoch,
            planned_end=plan.planned_end,
            validation_unit=self.batches.steps_an_epoch,
            method_state=self.state,
            gives_up=lambda: GUARD if self.config.guards.stop and self.state.alerts else None,
        )

    def _facts(self, iterations: int) -> dict[str, Any]:
        """The account of rows and tokens, for the log."""
        rows, tokens = list(map(account, self.data.reports)), self.tokens.counts()
        environment = {"precision": self.precision, "environment": self.environment}
        return {"rows": rows, "tokens": tokens, "iterations": iterations, **environment}

    def collect(self, iteration: int) -> Experience:
        """The experience of an iteration, written by the policy as it is; its figures, logged; the guards, asked."""
        settings, began, cap = self.config.training, time.monotonic(), self.config.rollout.importance_cap
        request, coefficient = self.asked(iteration), self.controller.coefficient
        with self.trained.whole():
            rollouts = self.collector(request, iteration=iteration)
        how, old = AdvantageSettings.of(settings, importance_cap=cap), self.config.old_logprobs
        experience = experience_of(
            request.prompts, rollouts, old_logprobs=old, kl_coefficient=coefficient, settings=how
        )
        self.state.join_extremes(self.world)
        metrics = {
            **rollout_metrics(rollouts, estimator=settings.kl_report, importance_cap=cap),
            **variance_explained(experience.values, experience.returns),
            "kl_coefficient": coefficient,
            **self.objective.extremes.taken(),
        }
        self.objective.kl_coefficient = coefficient
        self.controller.observe(metrics["kl"], len(rollouts))
        timing = {"seconds": time.monotonic() - began, **self.engine.timing()}
        self.fit.record("rollout", {"iteration": iteration, **metrics}, timing)
        told = [f"{name} {figure(metrics[name])}" for name in ("reward", "kl", "response_length", "end_share")]
        self.progress.say(f"iteration {iteration + 1}: {' · '.join(told)}")
        self._ask_guards(metrics)
        return experience

    def asked(self, iteration: int) -> Request:
        """What the engine is asked for in an iteration."""
        prompts = [self.prompts[place] for place in self.batches.plan.prompts_of(iteration)]
        return request_of(prompts, seeded(self.sampling, iteration))

    def _ask_guards(self, metrics: Mapping[str, float]) -> None:
        for alert in self.guards.observe(metrics):
            self.state.alerts.append(alert.message)
            self.progress.warn(f"alarm: {alert.message}")
            self.fit.record("alarm", alert.as_json(), {})

    def _check(self) -> PolicyCheck:
        section, judge, report = self.config.evaluation, None, self.config.training.kl_report
        if section.judge is not None:
            judge = judge_of(section.judge, self.tokenizer, self.device, is_function=section.judge_is_function)
        where = self.collector, self.validation_prompts, self.sampling
        return PolicyCheck(*where, judge, estimator=report, kl_limit=section.kl_limit)

    def _validation(self) -> Validation:
        metric = "reward" if self.config.evaluation.kl_limit is None else "reward_within_kl"
        settings, own = self.config.training, self.metrics
        early = settings.early_stopping
        named = (settings.metric or "", (early.metric if early is not None else None) or "")
        # Named or not, the reward is held against the limit of the KL; the user's own metrics are not.
        decides = named[0] if named[0] in own.functions else metric
        watched = named[1] if named[1] in own.functions else "reward"
        directions = [own.direction(name, {metric: "max", "reward": "max"}) for name in (decides, watched)]
        rows, digest = len(self.validation_prompts), prompts_digest(self.validation_prompts)
        return Validation(self.validate, decides, directions[0], watched, directions[1], rows, digest, own.directions)

    def validate(self) -> dict[str, float]:
        """Metrics of the policy's answers to the validation prompts; what it said goes to samples.jsonl."""
        assert self.check is not None
        step = self.fit.position.step
        with self.trained.whole():
            for told in self.check.best_of_n(self.config.evaluation.best_of) if step == 0 else ():
                self.fit.record("best_of_n", told, {})
            metrics, records = self.check.measure(is_start=step == 0)
        if self.world.is_first:
            write_samples(self.run_dir / "samples.jsonl", step, records)
        self._ask_guards({name: metrics[name] for name in ("judge",) if name in metrics})
        responses, prompts = ([record[key] for record in records] for key in ("response", "prompt"))
        with preserve_random_states():
            return self.metrics.added(
                metrics, responses, prompts, is_first=self.world.is_first, gather=self.world.gather
            )

    def export(self) -> None:
        """Takes the best weights, or the last, and writes the model folder and the report. Raises `DiskFull`."""
        settings, policy = self.config.training, self.roles.actor_critic.policy.causal
        take_chosen(
            self.trained, self.run_dir, settings, self.result, self.world, self.progress, callbacks=self.callbacks
        )
        if not self.trained.gather():
            return
        lora = settings.lora or LoraSection() if settings.trainable == "lora" else None
        base, needed_bytes = self.config.data.pretrained_weights, 4 * sum(p.numel() for p in policy.parameters())
        self.tokenizer.chat_template = self.encoder.template.source
        with explain_disk_full(self.run_dir, needed_bytes, "the trained model"):
            export_language_model(self.run_dir, policy, self.tokenizer, self.description(), lora=lora, base=base)
            write_report(self.run_dir)
        self.progress.say(f"model: {self.run_dir / 'model'} · report: {self.run_dir / 'report.md'}")

    def description(self) -> dict[str, Any]:
        """What the model folder says of how it is spoken to."""
        return {
            "method": "ppo",
            "stop_tokens": list(self.encoder.template.stop_tokens),
            "precision": "bf16" if self.precision == "bf16" else "fp32",
            "pretrained_weights": os.path.basename(self.config.data.pretrained_weights.rstrip("/")),
        }
