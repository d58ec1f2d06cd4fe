"""Settings of runs, models and adapters, and `UserError` for errors that users can fix."""
