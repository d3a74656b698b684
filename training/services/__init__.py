"""The only places that change rows of tasks and models. Views, wizard and worker call them; they know neither."""
