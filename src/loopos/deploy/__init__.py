"""From trained models to one that ships."""
