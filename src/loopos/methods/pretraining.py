"""Pretraining: a tokenizer and a new causal language model from plain text.

    text → documents → byte-level BPE → segments of tokens → next-token loss → update

Writes a run folder, and the weights with their config and tokenizer to `data.output_weights`, which other configs name.
"""

from __future__ import annotations

import math
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.config.pretraining import PretrainingConfig
from loopos.data.batches import Batch, PackedRows, StepBatches
from loopos.data.corpus import load_corpus
from loopos.data.digest import rows_digest
from loopos.data.repeats import key_of_prompt, repeats_summary
from loopos.data.split import split_off
from loopos.data.tokens import encode_corpus, train_tokenizer
from loopos.methods.base import Trainer
from loopos.models.folders import save_pretrained
from loopos.models.language_model import LanguageModel
from loopos.models.load import Sizes, new_config
from loopos.models.tokenizers import open_tokenizer
from loopos.training.fit import Fit
from loopos.training.identity import of_text
from loopos.training.objectives import NextToken, mean_loss, with_router_loss
from loopos.training.validation import Validation


class Pretrainer(Trainer[PretrainingConfig]):
    """Trains a tokenizer and a language model from nothing: `Pretrainer(config).train()`."""

    def load_data(self) -> None:
        """Reads the documents, splits them, trains or opens the tokenizer, cuts the pieces; says what was decided."""
        data, settings = self.config.data, self.config.training
        corpus = load_corpus(data, data.source)
        documents, held_out = list(corpus.documents), []
        self.progress.say(corpus.summary)
        if data.validation_data is not None:
            validation = load_corpus(data, data.validation_data)
            held_out = list(validation.documents)
            self.progress.say(f"validation: {validation.summary}")
        elif data.validation_share > 0 and len(documents) > 1:
            keys = [key_of_prompt(document) for document in documents]
            split = split_off(keys, data.validation_share, settings.seed, by=data.split_by, what="text")
            documents, held_out = [documents[i] for i in split.train], [documents[i] for i in split.validation]
            self.progress.say(split.summary.replace("rows", "documents"))
        for sentence in repeats_summary(documents, held_out, "text"):
            self.progress.say(sentence.replace("rows", "documents"))
        self.tokenizer = self._tokenizer(documents)
        self.max_length = settings.max_length or Sizes.max_length
        self.pieces = encode_corpus(self.tokenizer, documents, max_length=self.max_length)
        self.validation_pieces = encode_corpus(self.tokenizer, held_out, max_length=self.max_length)
        tokens = sum(len(piece.ids) for piece in self.pieces)
        self.progress.say(
            f"tokenizer of {len(self.tokenizer)} tokens; {tokens:,} tokens in {len(self.pieces)} pieces of at most "
            f"{self.max_length}"
        )

    def _tokenizer(self, documents: list[str]) -> PreTrainedTokenizerBase:
        named = self.config.data.tokenizer
        if named is not None:
            return open_tokenizer("new", named, trust_remote_code=self.trust_remote_code)
        vocab_size = self.config.model.vocab_size
        assert vocab_size is not None, "checked by the config"
        tokenizer = train_tokenizer(documents, vocab_size)
        if len(tokenizer) < vocab_size:
            self.progress.say(f"the text gives {len(tokenizer)} tokens, fewer than model.vocab_size = {vocab_size}")
        return tokenizer

    def build_model(self) -> LanguageModel:
        """A new Llama-style model of the config's sizes, and the number format."""
        settings, section = self.config.training, self.config.model
        self.choose_precision()
        config = new_config(Sizes.of(section, max_length=self.max_length))
        config.pad_token_id, config.bos_token_id = self.tokenizer.pad_token_id, self.tokenizer.bos_token_id
        config.eos_token_id = self.tokenizer.eos_token_id
        self.model = LanguageModel(LlamaForCausalLM(config), attention=section.attention)
        if settings.gradient_checkpointing:
            self.model.causal.activation_checkpointing_enable()
        self.train_weights(self.model)
        self.progress.say(self.trained.summary())
        return self.model

    def build_fit(self) -> Fit[Batch]:
        """Optimizer, update, batches and loop."""
        settings, (rank, size) = self.config.training, self.world.data_parallel
        validates = self.config.validates and bool(self.validation_pieces)
        return self.fit_of(
            update=self.update_of(self.model),
            batches=StepBatches.of(settings, PackedRows(self.pieces, None, self.device), rank=rank, world=size),
            objective=with_router_loss(NextToken(self.model), self.model.backbone, settings.router_aux_loss),
            validation=self._validation() if validates else None,
            identity=of_text(self.config, self.pieces, self.tokenizer, max_length=self.max_length),
            facts={"pieces": len(self.pieces)},
        )

    def _validation(self) -> Validation:
        if self.metrics:
            named = ", ".join(self.metrics.functions)
            raise UserError(f"metrics: got {named}; expected none: pretraining has no predictions to measure")
        rows = rows_digest(self.validation_pieces)
        return Validation(self.validate, "loss", "min", "loss", "min", len(self.validation_pieces), rows)

    def validate(self) -> dict[str, float]:
        """Mean next-token loss (nats) of the validation pieces, and perplexity = exp(loss)."""
        loss = mean_loss(NextToken(self.model), self.validation_pieces, device=self.device, world=self.world)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def exported(self) -> LanguageModel:
        return self.model

    def write_model(self) -> None:
        save_pretrained(Path(self.config.data.output_weights), self.model.causal, self.tokenizer)

    def export_summary(self) -> list[str]:
        return [f"weights: {self.config.data.output_weights} · report: {self.run_dir / 'report.md'}"]
