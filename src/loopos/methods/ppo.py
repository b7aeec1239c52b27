"""Proximal policy optimization: a language model learns to write responses that are scored high.

    prompts → responses → scores, reference, values → token rewards → GAE → shuffled minibatches → update

After Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022 and Huang et al. 2024. The four models are in
`rl.roles`, the rollouts in `rl.collector`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from typing import Any

from transformers import PreTrainedModel

from loopos.config.figures import figure
from loopos.config.ppo import PpoConfig
from loopos.data.digest import prompts_digest
from loopos.data.preference_data import load_prompts
from loopos.data.preference_tokens import PreferenceEncoder
from loopos.functional.advantages import KlController
from loopos.methods.base import Trainer
from loopos.models.folders import (
    OpenedReward,
    check_same_tokens,
    descriptions_together,
    export_language_model,
    open_reward_model,
)
from loopos.models.load import NUMBER_FORMATS, fingerprint
from loopos.rl.algorithms import Algorithm
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
from loopos.rl.rewards import RewardRun, Rewards, judge_of
from loopos.rl.roles import RolePlan, Roles, build_roles
from loopos.rl.rollouts import RolloutBatches, RolloutPlan
from loopos.rl.workers.opening import DataParallel, RunView, check_installed, open_rollouts
from loopos.rl.workers.protocol import Request
from loopos.rl.workers.remote import RemoteRollouts
from loopos.training.fit import Fit, RunPlan
from loopos.training.identity import of_policy
from loopos.training.progress import write_samples
from loopos.training.run_state import FitResult
from loopos.training.stopping import GUARD
from loopos.training.validation import Validation


class PpoTrainer(Trainer[PpoConfig]):
    """Trains a policy on rewards: `PpoTrainer(config).train()`."""

    def train(self, *, resume: bool = False) -> FitResult:
        check_installed(self.config.rollout)
        return super().train(resume=resume)

    def running(self) -> AbstractContextManager[Any]:
        return closing(self.engine)

    def load_data(self) -> None:
        """Reads the prompts, loads policy and reward model, and tokenizes; says what was decided."""
        config, data, settings = self.config, self.config.data, self.config.training
        self.data = load_prompts(data, data.source, seed=settings.seed)
        self.pretrained = self.load_pretrained(causal=True)
        self.tokenizer = self.pretrained.tokenizer
        self.opened_rewards: list[OpenedReward] = []
        for reward_model in data.reward_models:
            self.opened_rewards.append(open_reward_model(reward_model))
            check_same_tokens(self.tokenizer, self.opened_rewards[-1].tokenizer, f"data.reward_model: {reward_model}")
        whole = self.longest_of(self.pretrained)
        room = None if whole is None else whole - config.generation.max_new_tokens
        limit = min((each for each in (room, data.max_prompt_tokens) if each is not None), default=None)
        self.encoder = PreferenceEncoder(data, self.tokenizer, max_length=limit)
        self.prompts, self.tokens = self.encoder.prompts(self.data.train)
        chosen = self.data.validation[: config.evaluation.prompts] if config.validates else []
        self.validation_prompts: list[list[int]] = self.encoder.prompts(chosen)[0] if chosen else []
        tokens = f"tokens: {self.tokens.summary()}"
        self.progress.say(self.pretrained.summary, *self.data.summary, self.encoder.template.summary, tokens)

    def build_model(self) -> Roles:
        """Policy, reference, reward and value model; what trains; the engine that generates with the same weights."""
        config, settings = self.config, self.config.training
        self.choose_precision()
        scored_by = [fingerprint(opened.model.backbone.model) for opened in self.opened_rewards]
        self.base = ", rewards ".join([self.pretrained.fingerprint, *scored_by])
        self.roles = build_roles(
            self.pretrained,
            self.opened_rewards,
            settings,
            RolePlan(config.value_model, config.needs_reference, config.generation.temperature),
            attention=config.model.attention,
            adapter=config.data.adapter,
        )
        self.reward_description = descriptions_together([opened.description for opened in self.opened_rewards])
        # What became an adapter of the policy's trunk needs its own weights no more.
        self.opened_rewards.clear()
        self.roles.cast_frozen(NUMBER_FORMATS["bf16"] if self.precision == "bf16" else None)
        self.train_weights(
            self.roles.actor_critic,
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
                run=RunView(lambda: self.fit.position.step, lambda: self.batches.plan.iterations, self.request),
                say=self.progress.say,
                trust_remote_code=self.trust_remote_code,
            )
        self.progress.say(self.roles.summary, self.trained.summary(), self.engine.summary)
        return self.roles

    def build_fit(self) -> Fit[ResponseBatch]:
        """Rewards, rollouts, objective, optimizer and loop."""
        config, settings, world, actor_critic = self.config, self.config.training, self.world, self.roles.actor_critic
        self.algorithm = Algorithm.of(settings.algorithm, config.algorithm)
        rank, size = world.data_parallel
        plan = RolloutPlan.of(
            settings,
            num_prompts=len(self.prompts),
            rank=rank,
            world=size,
            responses_per_prompt=config.generation.responses_per_prompt,
        )
        rewards = Rewards.of(
            self.roles.reward,
            self.reward_description,
            config.reward,
            config.generation,
            self.device,
            self.tokenizer,
            RewardRun(self.run_dir, world.rank, plan.iterations),
        )
        # In one process, and a format that does not run in steps alone, judging is the first step's forward pass.
        reused = ReusedForward(plan.batches_of) if world.size == 1 and self.precision != "fp16" else None
        origins, gather = self.encoder.origins, world.gather_data_parallel
        self.collector = Collector(
            self.engine, self.roles, rewards, device=self.device, origins=origins, reused=reused, gather=gather
        )
        self.controller = KlController(settings.kl_coefficient, target=settings.kl_target, horizon=settings.kl_horizon)
        self.monitor = Monitor(MonitorLimits(**config.guards.model_dump(exclude={"stop"})))
        self.objective = PpoObjective.of(settings, actor_critic, self.algorithm, reused=reused)
        self.batches = RolloutBatches(plan, self.collect, self.device)
        self.check = self._check() if self.validation_prompts else None
        ahead = self.engine if isinstance(self.engine, RemoteRollouts) else None
        self.state = PolicyState(self.batches, self.controller, self.objective, self.monitor, self.check, ahead)
        self.state.rewards = rewards
        values = {name for name, _ in actor_critic.named_parameters() if name.startswith("critic.")}
        optimizer = settings.model_copy(update={"head_learning_rate": settings.value_learning_rate})
        return self.fit_of(
            update=self.update_of(actor_critic, head=values, settings=optimizer),
            batches=self.batches,
            objective=self.objective,
            validation=self._validation() if self.check is not None else None,
            identity=of_policy(
                self.config, self.prompts, self.encoder, base=self.base, rewards_read_rows=rewards.read_rows
            ),
            facts=self._facts(plan.iterations),
            plan=RunPlan(
                steps=plan.iterations * self.batches.steps_an_epoch,
                end=plan.planned_end,
                validation_unit=self.batches.steps_an_epoch,
                gives_up=lambda: GUARD if self.config.guards.stop and self.state.alerts else None,
            ),
            method_state=self.state,
        )

    def _facts(self, iterations: int) -> dict[str, Any]:
        """The account of rows and tokens, for the log."""
        rows, tokens = [report.summary() for report in self.data.reports], self.tokens.counts()
        return {"rows": rows, "tokens": tokens, "iterations": iterations}

    def collect(self, iteration: int) -> Experience:
        """The experience of an iteration, from the policy as it is; its metrics are logged and monitored."""
        settings, began, cap = self.config.training, time.monotonic(), self.config.rollout.importance_cap
        request, coefficient = self.request(iteration), self.controller.coefficient
        with self.trained.whole():
            rollouts = self.collector(request, iteration=iteration)
        how = AdvantageSettings.of(
            settings,
            self.algorithm,
            importance_cap=cap,
            responses_per_prompt=self.config.generation.responses_per_prompt,
        )
        old = self.config.old_logprobs
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
        if "kl" in metrics:
            self.controller.observe(metrics["kl"], len(rollouts))
        timing = {"seconds": time.monotonic() - began, **self.engine.timing()}
        self.fit.record("rollout", {"iteration": iteration, **metrics}, timing)
        shown = [name for name in ("reward", "kl", "response_length", "eos_rate") if name in metrics]
        figures = [f"{name} {figure(metrics[name])}" for name in shown]
        self.progress.say(f"iteration {iteration + 1}: {' · '.join(figures)}")
        self._watch(metrics)
        return experience

    def request(self, iteration: int) -> Request:
        """What the engine generates in an iteration."""
        prompts = [self.prompts[index] for index in self.batches.plan.prompts_of(iteration)]
        return request_of(prompts, seeded(self.sampling, iteration))

    def _watch(self, metrics: Mapping[str, float]) -> None:
        for alert in self.monitor.observe(metrics):
            self.state.alerts.append(alert.message)
            self.progress.warn(f"alert: {alert.message}")
            self.fit.record("alert", alert.as_json(), {})

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
            for point in self.check.best_of_n(self.config.evaluation.best_of) if step == 0 else ():
                self.fit.record("best_of_n", point, {})
            metrics, records = self.check.measure(is_start=step == 0)
        if self.world.is_first:
            write_samples(self.run_dir / "samples.jsonl", step, records)
        self._watch({name: metrics[name] for name in ("judge",) if name in metrics})
        responses, prompts = ([record[key] for record in records] for key in ("response", "prompt"))
        return self.with_own_metrics(metrics, responses, prompts)

    def exported(self) -> PreTrainedModel:
        return self.roles.actor_critic.policy.causal

    def write_model(self) -> None:
        self.tokenizer.chat_template = self.encoder.template.source
        base, policy = self.config.data.pretrained_weights, self.exported()
        export_language_model(self.run_dir, policy, self.tokenizer, self.description(), lora=self.lora, base=base)

    def description(self) -> dict[str, Any]:
        """What the model folder records of how the policy ends an answer."""
        return {
            "method": "ppo",
            "stop_tokens": list(self.encoder.template.stop_tokens),
            **super().description(),
        }
