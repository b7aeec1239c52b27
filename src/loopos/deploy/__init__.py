"""From a trained model to one that ships."""
