"""How a job is placed, watched, configured and saved; knows no model and no data."""
