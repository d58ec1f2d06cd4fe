"""Settings of a run and of a model, and the errors that users can fix."""
