"""Data files looked at as training reads them."""
