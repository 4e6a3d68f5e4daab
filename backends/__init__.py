"""Networks made into denoisers."""
