"""Pages (pages.py), what a person does to a task (actions.py), data for charts and downloads (feeds.py)."""
