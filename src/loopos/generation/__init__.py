"""Generation: prompts of token ids → completions; sampling, beams, and reasoning in steps."""
