"""Reinforcement learning from rewards: prompts → rollouts → rewards → advantages → minibatches."""
