"""Deployment: from a trained model to one that ships."""
