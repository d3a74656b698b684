"""The only places that change rows of tasks and models; called by views, wizard and worker."""
