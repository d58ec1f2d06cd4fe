"""Settings: what a run and a model are, and every error a user can fix. Standard library only."""
