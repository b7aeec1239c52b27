"""Reinforcement learning: a language model learns to write responses that are scored high, by PPO or another algorithm
of `rl.algorithms`.

    prompts → responses → scores, reference, values → token rewards → advantages → shuffled minibatches → update

After Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022, Huang et al. 2024 and Shao et al. 2024. The models
are in `rl.roles`, the rollouts in `rl.collector`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any

from transformers import PreTrainedModel

from loopos.config.diagnostics import UserError
from loopos.config.figures import figure
from loopos.config.ppo import PpoConfig
from loopos.data.digest import prompts_digest
from loopos.data.preference_data import PreferenceData
from loopos.data.preference_tokens import PreferenceEncoder
from loopos.data.prompts import Prompt
from loopos.functional.advantages import KlController
from loopos.generation.settings import SamplingParams
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
    Rollout,
    request_of,
    rollout_metrics,
    rollout_records,
    sampling_of,
    seeded,
    variance_explained,
)
from loopos.rl.environments import EnvironmentClass
from loopos.rl.experience import AdvantageSettings, Experience, ResponseBatch, ReusedForward, experience_of
from loopos.rl.monitors import Monitor, MonitorLimits
from loopos.rl.objective import PolicyState, PpoObjective
from loopos.rl.policy_check import PolicyCheck
from loopos.rl.prompt_sampling import Curriculum, Drawn, draw, no_signal_fraction
from loopos.rl.rewards import RewardRun, Rewards, judge_of
from loopos.rl.roles import RolePlan, Roles, build_roles
from loopos.rl.rollouts import RolloutBatches, RolloutPlan
from loopos.rl.tasks import load_policy_prompts, tasks_of
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
        config, data = self.config, self.config.data
        self.environment_class = None if config.environment is None else EnvironmentClass(config.environment.name)
        self.data: PreferenceData[Prompt] = load_policy_prompts(config, self.environment_class)
        self.pretrained = self.load_pretrained(causal=True)
        self.tokenizer = self.pretrained.tokenizer
        self.opened_rewards: list[OpenedReward] = []
        for reward_model in data.reward_models:
            self.opened_rewards.append(open_reward_model(reward_model))
            check_same_tokens(self.tokenizer, self.opened_rewards[-1].tokenizer, f"data.reward_model: {reward_model}")
        whole = self.longest_of(self.pretrained)
        room = None if whole is None else whole - config.longest_response
        limit = min((each for each in (room, data.max_prompt_tokens) if each is not None), default=None)
        self.encoder = PreferenceEncoder(data, self.tokenizer, max_length=limit)
        self.prompts, self.tokens = self.encoder.prompts(self.data.train)
        chosen = self.data.validation[: config.evaluation.prompts] if config.validates else []
        self.validation_prompts: list[list[int]] = []
        self.tasks = self.validation_tasks = None
        if chosen:
            self.validation_prompts, counted = self.encoder.prompts(chosen)
        if self.environment_class is not None:
            self.tasks = tasks_of(self.data.train, self.tokens.indices)
            self.validation_tasks = tasks_of(chosen, counted.indices) if chosen else []
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
        self.share_prompts = (
            config.generation.responses_per_prompt > 1
            and self.device.type == "cpu"
            and self.roles.actor_critic.supports_shared_prompts
        )
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
                template=self.encoder.template,
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
        rewards = self.rewards_of(RewardRun(self.run_dir, world.rank, plan.iterations))
        reused = self._build_collector(rewards, plan)
        self.controller = KlController(settings.kl_coefficient, target=settings.kl_target, horizon=settings.kl_horizon)
        self.monitor = Monitor(MonitorLimits(**config.guards.model_dump(exclude={"stop"})))
        self.objective = PpoObjective.of(
            settings,
            actor_critic,
            self.algorithm,
            max_new_tokens=config.longest_response,
            reused=reused,
        )
        self.batches = RolloutBatches(plan, self.collect, self.device, share_prompts=self.share_prompts)
        self.check = self._check() if self.validation_prompts else None
        ahead = self.engine if isinstance(self.engine, RemoteRollouts) else None
        parts = self.batches, self.controller, self.objective, self.monitor, self.check
        self.state = PolicyState(*parts, ahead=ahead, curriculum=self.curriculum, rewards=rewards)
        values = {name for name, _ in actor_critic.named_parameters() if name.startswith("critic.")}
        optimizer = settings.model_copy(update={"head_learning_rate": settings.value_learning_rate})
        return self.fit_of(
            update=self.update_of(actor_critic, head=values, settings=optimizer),
            batches=self.batches,
            objective=self.objective,
            validation=self._validation() if self.check is not None else None,
            identity=of_policy(self.config, self.prompts, self.encoder, base=self.base, rows=self._rows_read(rewards)),
            facts=self._facts(plan.iterations),
            plan=RunPlan(
                steps=plan.iterations * self.batches.steps_an_epoch,
                end=plan.planned_end,
                validation_unit=self.batches.steps_an_epoch,
                gives_up=lambda: GUARD if self.config.guards.stop and self.state.alerts else None,
            ),
            method_state=self.state,
        )

    def _rows_read(self, rewards: Rewards) -> list[Mapping[str, object]] | None:
        """The rows of data that decide rewards beside the prompts; None if none do."""
        if self.tasks is not None:
            return [task.row for task in self.tasks]
        return [self.encoder.origins[tuple(ids)].row for ids in self.prompts] if rewards.read_rows else None

    def rewards_of(self, run: RewardRun | None = None) -> Rewards:
        """What scores responses. run: None outside a run. Raises `UserError` for functions that do not exist."""
        config, weight = self.config, None
        if self.environment_class is not None and self.environment_class.has_reward:
            assert config.environment is not None
            weight = config.environment.reward_weight
        elif self.environment_class is not None and not config.reward.functions and config.data.reward_model is None:
            raise UserError(
                f"environment {self.environment_class.name} has no method reward; expected one, or reward.functions, "
                "or data.reward_model"
            )
        return Rewards.of(
            self.roles.reward,
            self.reward_description,
            config.reward,
            config.generation,
            self.device,
            self.tokenizer,
            run,
            environment_weight=weight,
        )

    def _build_collector(self, rewards: Rewards, plan: RolloutPlan) -> ReusedForward | None:
        """Sets what makes the rollouts of an iteration; returns what keeps their forward pass for the first step."""
        settings, world = self.config.training, self.world
        # In one process, and a format that does not run in steps alone, judging is the first step's forward pass.
        # Dynamic sampling replaces responses after they were judged.
        keeps = world.size == 1 and self.precision != "fp16" and not settings.dynamic_sampling
        reused = ReusedForward(plan.response_batches) if keeps else None
        self.collector = Collector(
            self.engine,
            self.roles,
            rewards,
            device=self.device,
            origins=self.encoder.origins,
            reused=reused,
            share_prompts=self.share_prompts,
            reads_forward=self.config.reads_forward,
            gather=world.gather_data_parallel,
        )
        self._updates_began: float | None = None
        self.curriculum: Curriculum | None = None
        if settings.curriculum is not None:
            self.curriculum = Curriculum(settings.curriculum, num_prompts=len(self.prompts), seed=settings.seed)
        return reused

    def _facts(self, iterations: int) -> dict[str, Any]:
        """The account of rows and tokens, for the log."""
        rows, tokens = [report.summary() for report in self.data.reports], self.tokens.counts()
        return {"rows": rows, "tokens": tokens, "iterations": iterations}

    def collect(self, iteration: int) -> Experience:
        """The experience of an iteration, from the policy as it is; its metrics are logged and monitored."""
        config, settings, began, stepped = (
            self.config,
            self.config.training,
            time.monotonic(),
            self.fit.position.seconds,
        )
        coefficient, cap = self.controller.coefficient, config.rollout.importance_cap
        size = config.generation.responses_per_prompt
        drawn = self._drawn(iteration)
        how = AdvantageSettings.of(settings, self.algorithm, importance_cap=cap, responses_per_prompt=size)
        experience = experience_of(
            [rollout.response.prompt_ids for rollout in drawn.trained],
            drawn.trained,
            old_logprobs=config.old_logprobs,
            kl_coefficient=coefficient,
            settings=how,
        )
        self.state.join_extremes(self.world)
        metrics = {
            **rollout_metrics(drawn.first, estimator=settings.kl_report, importance_cap=cap),
            **({"no_signal": no_signal_fraction(drawn.first, size)} if size > 1 else {}),
            **self._redrawn(drawn),
            **variance_explained(experience.values, experience.returns),
            "kl_coefficient": coefficient,
            **self.objective.extremes.taken(),
        }
        self.objective.kl_coefficient = coefficient
        if "kl" in metrics:
            self.controller.observe(metrics["kl"], len(drawn.first))
        timing = {"seconds": time.monotonic() - began, **self.collector.timing(), **self.engine.timing()}
        if self._updates_began is not None:
            # A step that begins an iteration has its rollouts in its seconds.
            timing["update_seconds"] = stepped - self._updates_began
        self._updates_began = stepped + timing["seconds"]
        self.fit.record("rollout", {"iteration": iteration, **metrics}, timing)
        shown = [name for name in ("reward", "kl", "no_signal", "response_length", "eos_rate") if name in metrics]
        figures = [f"{name} {figure(metrics[name])}" for name in shown]
        self.progress.say(f"iteration {iteration + 1}: {' · '.join(figures)}")
        if settings.log_rollouts and self.world.is_first:
            records = rollout_records(drawn.trained, experience.advantages, iteration)[: settings.log_rollouts]
            write_samples(self.run_dir / "rollouts.jsonl", self.fit.position.step, records)
        self._watch(metrics)
        return experience

    def _drawn(self, iteration: int) -> Drawn:
        """The rollouts of an iteration, with other prompts in place of those without signal."""
        sampling = seeded(self.sampling, iteration)

        def generate(numbers: Sequence[int], attempt: int) -> list[Rollout]:
            if attempt == 0:
                return self.collector(self.request(iteration), iteration=iteration)
            request = self._request_of(numbers, seeded(sampling, attempt))
            return self.collector(request, reward_iteration=iteration)

        with self.trained.whole():
            drawn = draw(
                generate,
                self._prompts_of(iteration),
                self.batches.plan,
                iteration=iteration,
                attempts=self.config.training.dynamic_sampling,
            )
        if self.curriculum is not None:
            for number, scores in drawn.groups:
                self.curriculum.observe(number, scores)
        return drawn

    def _redrawn(self, drawn: Drawn) -> dict[str, float]:
        """How many groups were generated in addition, and the fraction that trains without signal all the same."""
        if not self.config.training.dynamic_sampling:
            return {}
        left = no_signal_fraction(drawn.trained, self.config.generation.responses_per_prompt)
        return {"groups_redrawn": float(drawn.redrawn), "no_signal_left": left}

    def _prompts_of(self, iteration: int) -> list[int]:
        """Indices of an iteration's prompts, one for each response."""
        plan = self.batches.plan
        if self.curriculum is None:
            return plan.prompts_of(iteration)
        chosen = self.curriculum.choose(iteration, plan.num_groups)
        return [number for number in chosen for _ in range(plan.responses_per_prompt)]

    def request(self, iteration: int) -> Request:
        """What the engine generates in an iteration."""
        return self._request_of(self._prompts_of(iteration), seeded(self.sampling, iteration))

    def _request_of(self, numbers: Sequence[int], sampling: SamplingParams) -> Request:
        """A request for a response to each of these prompts."""
        tasks = None if self.tasks is None else [self.tasks[number] for number in numbers]
        return request_of([self.prompts[number] for number in numbers], sampling, tasks=tasks)

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
        return PolicyCheck(
            *where,
            judge,
            estimator=report,
            kl_limit=section.kl_limit,
            responses=section.responses,
            tasks=self.validation_tasks,
        )

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
            "method": self.config.computation.method,
            "stop_tokens": list(self.encoder.template.stop_tokens),
            **super().description(),
        }
