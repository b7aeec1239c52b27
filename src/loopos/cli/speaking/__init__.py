"""Conversations, prompts and traces: what language models are asked, and what they say."""
