"""Changes tables, and knows neither networks nor files."""
